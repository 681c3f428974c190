"""Reports that the commands print, draw and write about slices, pods and chips."""

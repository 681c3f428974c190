# ruff: noqa: E501 (lines as a compiler writes them)
"""Small scheduled programs, as XLA:TPU and XLA:GPU write them, for the tests of the reader."""

HEADER = "HloModule {name}, is_scheduled=true, num_partitions={partitions}\n"

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""

# A loop from 2 to 9 that goes by two, as windowed einsums do: rounds at 2, 4, 6 and 8.
BY_TWO = (
    HEADER.format(name="by_two", partitions=64)
    + ADD
    + """
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %held = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} add(%held, %one)
  %i.2 = s32[]{:T(128)} add(%i.1, %one)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%double, backend_config={"window_config":{"estimated_cycles":"1050"}}
  %i.3 = s32[]{:T(128)} copy(%i.2)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i.3, %y)
}
%double (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %d = f32[8,128]{1,0} add(%q, %q)
}
%condition (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(9)
  %n = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %bound), direction=LT
}
ENTRY %main (x.1: f32[8,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%two)
  %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%begin, %x.1)
  %w = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
)

# A gather of 64 MiB over all 64 chips that a computation of 1 ms (v4) hides in part, a copy to
# VMEM, and an all-reduce at once.
ASYNC = (
    HEADER.format(name="async", partitions=64)
    + ADD
    + """
%square (q: f32[128,128]) -> f32[128,128] {
  %q = f32[128,128]{1,0} parameter(0)
  ROOT %d = f32[128,128]{1,0} convolution(%q, %q), dim_labels=bf_io->bf
}
ENTRY %main (x: bf16[8192,64], y: f32[128,128]) -> f32[128,128] {
  %x = bf16[8192,64]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[128,128]{1,0:T(8,128)} parameter(1)
  %all-gather-start.1 = (bf16[8192,64]{1,0}, bf16[8192,4096]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,64]<=[64], dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/btd,df->btf/dot_general"}, backend_config={"collective_algorithm_config":{"emitter":"BarnaCoreAllGatherEmitter"}}
  %c-start = (f32[128,128]{1,0:S(1)}, f32[128,128]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %f = f32[128,128]{1,0:T(8,128)} fusion(%y), kind=kOutput, calls=%square, metadata={op_name="jit(step)/transpose(jvp())/btf,fd->btd/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1050000"}}
  %c-done = f32[128,128]{1,0:S(1)} copy-done(%c-start)
  %all-gather-done.1 = bf16[8192,4096]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce.1 = f32[128,128]{1,0:T(8,128)} all-reduce(%f), channel_id=2, replica_groups={}, to_apply=%add, backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter","strategy":"UniDirectionNDRingStrategy","debug":"\\nUniDirectionNDRingStrategy{colors:6 phases:3}"}}
}
"""
)

# An asynchronous collective fusion: the gather stands in the start, in the fusions that carry it
# on and in the done, and is one transfer.
FUSED = (
    HEADER.format(name="fused", partitions=64)
    + """
%begin (a: bf16[64,128]) -> (bf16[64,128], bf16[4096,128], u32[]) {
  %a = bf16[64,128]{1,0} parameter(0)
  %all-gather.1 = bf16[4096,128]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['x'=64] {'x'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[64,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%middle (a.1: bf16[64,128], b.1: bf16[4096,128], f.1: u32[], m: bf16[128,128]) -> (bf16[128,128], bf16[64,128], bf16[4096,128], u32[]) {
  %a.1 = bf16[64,128]{1,0} parameter(0)
  %b.1 = bf16[4096,128]{1,0} parameter(1)
  %f.1 = u32[]{:S(2)} parameter(2)
  %m = bf16[128,128]{1,0} parameter(3)
  %all-gather.2 = bf16[4096,128]{1,0} all-gather(%a.1), channel_id=7, replica_groups=mesh['x'=64] {'x'}, dimensions={0}
  %conv = bf16[128,128]{1,0} convolution(%m, %m), dim_labels=bf_io->bf
  ROOT %t = (bf16[128,128]{1,0}, bf16[64,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) tuple(%conv, %a.1, %b.1, %f.1)
}
%end (a.2: bf16[64,128], b.2: bf16[4096,128], f.2: u32[]) -> bf16[4096,128] {
  %a.2 = bf16[64,128]{1,0} parameter(0)
  %b.2 = bf16[4096,128]{1,0} parameter(1)
  %f.2 = u32[]{:S(2)} parameter(2)
  %all-gather.3 = bf16[4096,128]{1,0} all-gather(%a.2), channel_id=7, replica_groups=mesh['x'=64] {'x'}, dimensions={0}
  ROOT %custom-call.2 = bf16[4096,128]{1,0} custom-call(%a.2, %b.2, %all-gather.3, %f.2), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: bf16[64,128], y: bf16[128,128]) -> bf16[4096,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %y = bf16[128,128]{1,0} parameter(1)
  %s = (bf16[64,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin
  %g0 = bf16[64,128]{1,0} get-tuple-element(%s), index=0
  %g1 = bf16[4096,128]{1,0} get-tuple-element(%s), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %f = (bf16[128,128]{1,0}, bf16[64,128]{1,0}, bf16[4096,128]{1,0}, u32[]{:S(2)}) fusion(%g0, %g1, %g2, %y), kind=kOutput, calls=%middle, backend_config={"window_config":{"estimated_cycles":"5000"}}
  %h0 = bf16[64,128]{1,0} get-tuple-element(%f), index=1
  %h1 = bf16[4096,128]{1,0} get-tuple-element(%f), index=2
  %h2 = u32[]{:S(2)} get-tuple-element(%f), index=3
  ROOT %d = bf16[4096,128]{1,0} fusion(%h0, %h1, %h2), kind=kCustom, calls=%end
}
"""
)

# The TPU's reduce-scatter, a fusion of an all-reduce and a slice; a kernel whose attributes break
# over lines; an instruction that nobody knows; a matmul made again for want of memory.
ODD = (
    HEADER.format(name="odd", partitions=4)
    + ADD
    + """
%all-reduce-scatter.1 (input: f32[512,256]) -> f32[128,256] {
  %input = f32[512,256]{1,0} parameter(0)
  %all-reduce.7 = f32[512,256]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[128,256]{1,0} dynamic-slice(%all-reduce.7, %zero, %zero), dynamic_slice_sizes={128,256}
}
ENTRY %main (x: f32[512,256], q: bf16[2,4,1,1024,128], k: bf16[2,4,1024,128]) -> f32[128,256] {
  %x = f32[512,256]{1,0} parameter(0)
  %q = bf16[2,4,1,1024,128]{4,3,2,1,0} parameter(1)
  %k = bf16[2,4,1024,128]{3,2,1,0} parameter(2)
  %splash_mqa_fwd.3 = bf16[2,4,1,1024,128]{4,3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 512
}}, metadata={op_name="jit(step)/splash_mqa_fwd/pallas_call"}
  %conv.remat = f32[512,256]{1,0} convolution(%x, %x), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"100"}
  %what = f32[512,256]{1,0} frobnicate(%conv.remat)
  ROOT %f = f32[128,256]{1,0} fusion(%what), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
)

# XLA:GPU says rounds itself.
KNOWN = (
    HEADER.format(name="known", partitions=1)
    + """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %same = (s32[], f32[8]{0}) tuple(%p, %p)
}
%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %t = pred[] constant(true)
}
ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"31"}}
}
"""
)

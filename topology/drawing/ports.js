// Draws every port of every optical switch in #ports, and tells which is under the pointer.
(() => {
const data = JSON.parse(document.getElementById("portData").textContent);
const canvas = document.getElementById("ports"), says = document.getElementById("port");
const COLUMNS = 17, ROWS = data.state[0].length / COLUMNS, CELL = 4, GAP = 10, HEAD = 20;
const WIDE = COLUMNS * CELL + GAP, TALL = ROWS * CELL + GAP, FIELD = HEAD + 4 * TALL;
const counts = data.states.map((_, k) => data.state.flat().filter((state) => state === k).length);
const total = data.states.map((name, k) => `${counts[k].toLocaleString("en")} ${name}`).join(", ");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function draw() {
  const scale = 2;
  canvas.width = 4 * WIDE * scale;
  canvas.height = 3 * FIELD * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "11px system-ui, sans-serif";
  data.state.forEach((states, s) => {
    const d = Math.floor(s / 16), x = (s % 4) * WIDE, y = d * FIELD + HEAD + (Math.floor(s / 4) % 4) * TALL;
    if (s % 16 === 0) {
      pen.globalAlpha = 1;
      pen.fillStyle = style("--quiet");
      pen.fillText(`along ${"xyz"[d]}: place (i, j) in the face, i down, j across`, 0, y - 7);
    }
    states.forEach((state, port) => {
      pen.fillStyle = data.colours[state];
      pen.globalAlpha = state === 0 ? 0.32 : 1;
      pen.fillRect(x + (port % COLUMNS) * CELL, y + Math.floor(port / COLUMNS) * CELL, CELL - 0.8, CELL - 0.8);
    });
  });
}
const fibre = (f) => (f < 0 ? "no fibre" : `the ${f < data.blocks ? "+" : "\u2212"} fibre of block ${f % data.blocks}`);
function rest() {
  says.innerHTML = data.states.map((name, k) =>
    `<span class="swatch" style="background:${data.colours[k]}${k ? "" : ";opacity:.4"}"></span>${counts[k].toLocaleString("en")} ${name} `).join("&nbsp; ");
}
canvas.addEventListener("pointermove", (event) => {
  const unit = 4 * WIDE / canvas.clientWidth, x = event.offsetX * unit, y = event.offsetY * unit;
  const d = Math.floor(y / FIELD), j = Math.floor(x / WIDE), i = Math.floor((y - d * FIELD - HEAD) / TALL);
  const column = Math.floor((x - j * WIDE) / CELL), row = Math.floor((y - d * FIELD - HEAD - i * TALL) / CELL);
  if (d < 0 || d > 2 || i < 0 || i > 3 || j > 3 || column >= COLUMNS || row >= ROWS || column < 0 || row < 0) { rest(); return; }
  const s = 16 * d + 4 * i + j, port = row * COLUMNS + column, other = data.joined[s][port];
  says.textContent = `OCS ${data.names[s]}, port ${port}: ${data.states[data.state[s][port]]}, ${fibre(data.fibre[s][port])}` +
    (other < 0 ? "" : `, joined to port ${other}, ${fibre(data.fibre[s][other])}`);
});
canvas.addEventListener("pointerleave", rest);
canvas.dataset.counts = total;
window.addEventListener("themechange", draw);
draw();
rest();
})();

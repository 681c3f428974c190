// Draws the scene in #scene with WebGL: nodes as cubes, links as thick lines; tells what is under
// the pointer. Nothing is drawn but after a change.
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const trouble = (text) => { $("trouble").textContent = text; $("trouble").hidden = false; $("status").dataset.error = text; };
window.addEventListener("error", (event) => trouble(event.message));

const scene = JSON.parse($("scene").textContent);
const N = scene.labels.length, L = scene.tail.length, POINTS = 20;
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
const at = (i) => [scene.at[3 * i], scene.at[3 * i + 1], scene.at[3 * i + 2]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const failedNode = new Set(scene.failed), cut = new Set(scene.cut);
const figure = (x) => Number(x.toPrecision(6)).toLocaleString("en");

// Links of every node, for its highlight.
const linksOf = Array.from({ length: N }, () => []);
for (let l = 0; l < L; l++) {
  linksOf[scene.tail[l]].push(l);
  if (scene.head[l] !== scene.tail[l]) linksOf[scene.head[l]].push(l);
}

// Every link as a polyline: the straight ones have two points, the curved ones POINTS + 1.
let bent = 0;
const lines = scene.kind.map((kind, l) => {
  const p = at(scene.tail[l]), q = at(scene.head[l]);
  if (!kind) return [p, q];
  const c = scene.control.slice(6 * bent, 6 * ++bent);
  return Array.from({ length: POINTS + 1 }, (_, i) => {
    const t = i / POINTS, s = 1 - t;
    return [0, 1, 2].map((d) =>
      s * s * s * p[d] + 3 * s * s * t * c[d] + 3 * s * t * t * c[3 + d] + t * t * t * q[d]);
  });
});

// Of a hoop that is not drawn whole, its two ends.
bent = 0;
const stubs = lines.map((line, l) => {
  if (!scene.kind[l]) return null;
  const p = line[0], q = line[POINTS], end = scene.stub.slice(3 * bent, 3 * ++bent);
  return [[p, p.map((x, d) => x + end[d])], [q, q.map((x, d) => x - end[d])]];
});

// What the reader chose to see.
const shown = { kind: [true, true, true], dimension: [true, true, true], hoops: L <= scene.many };
const levels = [0, 1, 2].map((d) =>
  [...new Set(Array.from({ length: N }, (_, i) => scene.at[3 * i + d]))].sort((a, b) => a - b));
const limit = levels.map((values) => values.length - 1);
const nodeShown = (i) => [0, 1, 2].every((d) => scene.at[3 * i + d] <= levels[d][limit[d]]);
const linkShown = (l) => shown.kind[scene.kind[l]] && shown.dimension[scene.dimension[l]] &&
  nodeShown(scene.tail[l]) && nodeShown(scene.head[l]);

// ---- colours -------------------------------------------------------------------------------
const stops = scene.colours.load.map(rgb), kindColours = scene.colours.kinds.map(rgb);
const groupColours = scene.groups.map((group) => rgb(group.colour)), failedColour = rgb(scene.colours.failed);
const most = scene.values.map((value) => Math.max(1e-12, ...value.table));
const ramp = (t) => {
  const x = Math.min(1, Math.max(0, t)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x));
  return stops[i].map((c, k) => c + (stops[i + 1][k] - c) * (x - i));
};
const valueOf = (v, l) => [scene.values[v].table[scene.values[v].ahead[l]], scene.values[v].table[scene.values[v].back[l]]];
const choices = scene.values.map((value, v) => [value.name, (l) => ramp(Math.max(...valueOf(v, l)) / most[v]), v]);
choices.push(["kind of link", (l) => kindColours[scene.kind[l]], null]);
if (scene.blocks) choices.unshift(["slice", (l) => groupColours[scene.group[scene.tail[l]]], null]);
let choice = choices[0];

// ---- camera --------------------------------------------------------------------------------
const extent = levels.map((values) => values[values.length - 1] - values[0]);
const up = scene.blocks ? 1 : extent[2] <= Math.min(extent[0], extent[1]) ? 2 : extent[0] < extent[1] ? 0 : 1;
const across = extent[(up + 1) % 3] > extent[(up + 2) % 3];
const START = scene.blocks ? { yaw: -0.28, pitch: 0.3 } : { yaw: Math.PI + (across ? Math.PI / 2 - 0.5 : 0.5), pitch: 0.4 };
const TAN = Math.tan(Math.PI / 14);
const camera = { yaw: 0, pitch: 0, zoom: 1, target: [0, 0, 0] };
const canvas = $("view");
let view; // of the frame being drawn: axes, distance, size

function look() {
  const unit = (d, x) => { const v = [0, 0, 0]; v[d % 3] = x; return v; };
  const mix = (...terms) => [0, 1, 2].map((d) => terms.reduce((sum, [x, v]) => sum + x * v[d], 0));
  const a = unit(up + 1, 1), b = unit(up + 2, 1), u = unit(up, 1);
  const { yaw, pitch } = camera;
  const flat = mix([Math.cos(yaw), a], [Math.sin(yaw), b]);
  const toward = mix([Math.cos(pitch), flat], [Math.sin(pitch), u]);
  const right = mix([-Math.sin(yaw), a], [Math.cos(yaw), b]);
  const above = mix([Math.cos(pitch), u], [-Math.sin(pitch), flat]);
  const { clientWidth: width, clientHeight: height } = canvas;
  const aspect = width / Math.max(1, height), tall = TAN * 0.9, wide = TAN * aspect * 0.92;
  // From here all points are in the picture; the largest of closed forms, a point each.
  let distance = 1, reach = 1;
  const fit = (p) => {
    const z = dot(p, toward);
    distance = Math.max(distance, Math.abs(dot(p, right)) / wide + z, Math.abs(dot(p, above)) / tall + z);
    reach = Math.max(reach, Math.hypot(...p));
  };
  for (let i = 0; i < N; i++) fit(at(i));
  for (const line of lines) if (line.length > 2) for (let i = 4; i < POINTS; i += 6) fit(line[i]);
  for (const [, ...place] of scene.captions) fit(place);
  distance /= camera.zoom;
  const eye = mix([1, camera.target], [distance, toward]);
  const near = Math.max(0.02 * distance, distance - reach * 1.3), far = distance + reach * 1.3;
  view = { right, above, toward, distance, eye, width, height, aspect, near, far, reach };
}

// A place -> x, y in pixels of the page's canvas, and the distance along the line of sight.
function project(p) {
  const v = [p[0] - view.eye[0], p[1] - view.eye[1], p[2] - view.eye[2]];
  const w = Math.max(1e-6, -dot(v, view.toward)), half = view.height / 2 / TAN;
  return [view.width / 2 + dot(v, view.right) / w * half, view.height / 2 - dot(v, view.above) / w * half, w];
}

// ---- WebGL ---------------------------------------------------------------------------------
const gl = canvas.getContext("webgl2", { antialias: true });
if (!gl) { trouble("This browser has no WebGL 2: the figures beside are all there is to see. Turn on hardware acceleration."); return; }

const HEAD = `#version 300 es
precision highp float;
uniform vec3 eye, right, above, toward, ground;
uniform vec2 lens, depths; // 1 / tan of half the angle across and up; near and far
uniform float fog, veil, swell;
vec4 clip(vec3 p) {
  vec3 v = p - eye;
  float w = -dot(v, toward), n = depths.x, f = depths.y;
  return vec4(dot(v, right) * lens.x, dot(v, above) * lens.y, ((f + n) * w - 2. * f * n) / (f - n), w);
}
vec3 faded(vec3 colour, float w) {
  return mix(colour, ground, max(veil, fog * smoothstep(depths.x, depths.y, w)));
}
`;
const NODE_VERTEX = HEAD + `
in vec2 corner; in vec3 place, colour; in float failed;
uniform float radius;
out vec3 point, middle, paint; flat out float broken; out float w; out vec2 spot;
void main() {
  middle = place; paint = colour; broken = failed; spot = corner * 1.95;
  float size = radius * (1. + swell * failed) * 1.95;
  point = place + (right * corner.x + above * corner.y) * size;
  gl_Position = clip(point); w = gl_Position.w;
}`;
const NODE_FRAGMENT = HEAD + `
in vec3 point, middle, paint; flat in float broken; in float w; in vec2 spot;
uniform float radius;
out vec4 ink;
void main() { // the cube that the line of sight meets
  float r = radius * (1. + swell * broken);
  vec3 o = (eye - middle) / r, d = point - eye;
  vec3 a = (-1. - o) / d * r, b = (1. - o) / d * r;
  a /= r; b /= r;
  vec3 lo = min(a, b), hi = max(a, b);
  float t = max(max(lo.x, lo.y), lo.z), end = min(min(hi.x, hi.y), hi.z);
  if (t > end) discard;
  vec3 p = o + d * t, q = abs(p);
  vec3 n = step(vec3(max(max(q.x, q.y), q.z) - 1e-3), q) * sign(p);
  float light = .60 + .40 * max(0., dot(n, normalize(toward * .7 + above + right * .35)));
  vec2 face = abs(n.x) > .5 ? p.yz : abs(n.y) > .5 ? p.xz : p.xy;
  vec3 c = paint * light;
  float edge = smoothstep(.84, .92, max(abs(face.x), abs(face.y)));
  c = mix(c, c * .72, edge);
  if (broken > .5 && max(abs(spot.x), abs(spot.y)) < .75 && abs(abs(spot.x) - abs(spot.y)) < .15) c = vec3(1.);
  ink = vec4(faded(c, w), 1.);
}`;
const LINK_VERTEX = HEAD + `
in vec2 corner; in vec3 from, to, colour; in vec4 style; // lengths at both ends, dash, width
uniform vec2 size; uniform float thick, least;
out vec3 paint; out float along; flat out float dash; out float w;
void main() {
  vec4 a = clip(from), b = clip(to);
  float n = depths.x;
  if (a.w < n && b.w < n) { gl_Position = vec4(2., 2., 2., 1.); return; }
  if (a.w < n) a = mix(a, b, (n - a.w) / (b.w - a.w));
  if (b.w < n) b = mix(b, a, (n - b.w) / (a.w - b.w));
  vec2 s = (b.xy / b.w - a.xy / a.w) * size;
  vec2 across = length(s) < 1e-4 ? vec2(0., 1.) : normalize(vec2(-s.y, s.x));
  vec2 ahead = vec2(across.y, -across.x);
  vec4 p = corner.x < .5 ? a : b;
  float width = max(least, .5 * thick * style.w * lens.y * size.y / p.w) * .5;
  vec2 shift = across * corner.y * width + ahead * (corner.x * 2. - 1.) * width * .35;
  p.xy += shift / size * 2. * p.w;
  gl_Position = p; w = p.w;
  paint = colour; along = mix(style.x, style.y, corner.x); dash = style.z;
}`;
const LINK_FRAGMENT = HEAD + `
in vec3 paint; in float along; flat in float dash; in float w;
out vec4 ink;
void main() {
  if (dash > 0. && fract(along / dash) > .58) discard;
  ink = vec4(faded(paint, w), 1.);
}`;

function program(vertex, fragment) {
  const made = gl.createProgram();
  for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
  return made;
}
const nodeProgram = program(NODE_VERTEX, NODE_FRAGMENT), linkProgram = program(LINK_VERTEX, LINK_FRAGMENT);

// A set of instances of a quad; `parts` are the attributes of an instance with their sizes.
function instances(of, corners, parts) {
  const array = gl.createVertexArray(), quad = gl.createBuffer(), buffer = gl.createBuffer();
  const stride = parts.reduce((sum, [, size]) => sum + size, 0);
  gl.bindVertexArray(array);
  gl.bindBuffer(gl.ARRAY_BUFFER, quad);
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(corners), gl.STATIC_DRAW);
  const place = gl.getAttribLocation(of, "corner");
  gl.enableVertexAttribArray(place);
  gl.vertexAttribPointer(place, 2, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  let offset = 0;
  for (const [name, size] of parts) {
    const where = gl.getAttribLocation(of, name);
    gl.enableVertexAttribArray(where);
    gl.vertexAttribPointer(where, size, gl.FLOAT, false, 4 * stride, 4 * offset);
    gl.vertexAttribDivisor(where, 1);
    offset += size;
  }
  let count = 0;
  return {
    fill(values) {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(values), gl.DYNAMIC_DRAW);
      count = values.length / stride;
    },
    draw() { gl.bindVertexArray(array); gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count); },
  };
}
const NODE = [["place", 3], ["colour", 3], ["failed", 1]];
const LINK = [["from", 3], ["to", 3], ["colour", 3], ["style", 4]];
const CUBE = [-1, -1, 1, -1, -1, 1, 1, 1], STRIP = [0, -1, 1, -1, 0, 1, 1, 1];
const nodes = instances(nodeProgram, CUBE, NODE), litNodes = instances(nodeProgram, CUBE, NODE);
const links = instances(linkProgram, STRIP, LINK), litLinks = instances(linkProgram, STRIP, LINK);
const axes = instances(linkProgram, STRIP, LINK);
const badNodes = instances(nodeProgram, CUBE, NODE), badLinks = instances(linkProgram, STRIP, LINK);

const nodeValues = (i) => [...at(i), ...(failedNode.has(i) ? failedColour : groupColours[scene.group[i]]), +failedNode.has(i)];
const pieces = (l, whole) => (whole || !stubs[l] ? [lines[l]] : stubs[l]);
function linkValues(out, l, colour, whole) {
  const dash = cut.has(l) ? 0.22 : scene.kind[l] === 2 ? 0.3 : 0;
  const width = cut.has(l) ? 1.5 : scene.kind[l] ? 0.7 : 1;
  for (const line of pieces(l, whole)) {
    let length = 0;
    for (let i = 1; i < line.length; i++) {
      const before = length, [a, b] = [line[i - 1], line[i]];
      length += Math.hypot(b[0] - a[0], b[1] - a[1], b[2] - a[2]);
      out.push(...a, ...b, ...colour, before, length, dash, width);
    }
  }
}

let held = null, under = null, dirty = true; // held, under: {node} or {link}
function build() {
  const cubes = [], values = [], badCubes = [], badValues = [];
  let nodesDrawn = 0, drawn = 0;
  for (let i = 0; i < N; i++) if (nodeShown(i)) {
    (failedNode.has(i) ? badCubes : cubes).push(...nodeValues(i));
    nodesDrawn++;
  }
  for (let l = 0; l < L; l++) if (linkShown(l)) {
    if (cut.has(l)) linkValues(badValues, l, failedColour, true);
    else linkValues(values, l, choice[1](l), shown.hoops);
    drawn++;
  }
  nodes.fill(cubes); links.fill(values); badNodes.fill(badCubes); badLinks.fill(badValues);
  const status = $("status");
  status.textContent = `${nodesDrawn.toLocaleString("en")} ${scene.nodes}s and ${drawn.toLocaleString("en")} links drawn`;
  Object.assign(status.dataset, { nodes: nodesDrawn, links: drawn, kinds: [0, 1, 2].map((k) => scene.kind.filter((x, l) => x === k && linkShown(l)).length).join(" "), failedNodes: failedNode.size, failedLinks: cut.size });
  light();
}
function light() {
  const now = under ?? held, values = [], cubes = [];
  const ls = !now ? [] : now.link !== undefined ? [now.link] : linksOf[now.node].filter((l) => shown.dimension[scene.dimension[l]]);
  for (const l of ls) linkValues(values, l, cut.has(l) ? failedColour : choice[1](l), true);
  const is = new Set(ls.flatMap((l) => [scene.tail[l], scene.head[l]]));
  if (now?.node !== undefined) is.add(now.node);
  for (const i of is) cubes.push(...nodeValues(i));
  litLinks.fill(values);
  litNodes.fill(cubes);
  redraw();
}
function redraw() { if (!dirty) { dirty = true; requestAnimationFrame(draw); } }


// Where frames are slow (no graphics card), they are coarse as long as the scene is in motion.
let coarse = 1, rest = 0;
function inMotion() {
  const began = performance.now();
  requestAnimationFrame(() => requestAnimationFrame(() => {
    if (performance.now() - began > 90) coarse = Math.max(0.4, coarse * 0.75);
  }));
  clearTimeout(rest);
  rest = setTimeout(() => { if (coarse < 1) { coarse = 1; redraw(); } }, 400);
  redraw();
}

function draw() {
  dirty = false;
  look();
  const scale = coarse * Math.min(2, (window.devicePixelRatio || 1) * (L > 5000 ? 1 : 1.5));
  const width = Math.round(view.width * scale), height = Math.round(view.height * scale);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  gl.viewport(0, 0, width, height);
  const ground = rgb(getComputedStyle(document.documentElement).getPropertyValue("--ground").trim());
  gl.clearColor(...ground, 1);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.enable(gl.DEPTH_TEST);
  const lit = under ?? held;
  const set = (of, fog, veil, thick, radius) => {
    gl.useProgram(of);
    const put = (name) => gl.getUniformLocation(of, name);
    for (const name of ["eye", "right", "above", "toward"]) gl.uniform3fv(put(name), view[name]);
    gl.uniform3fv(put("ground"), ground);
    gl.uniform2f(put("lens"), 1 / TAN / view.aspect, 1 / TAN);
    gl.uniform2f(put("depths"), view.near, view.far);
    gl.uniform1f(put("fog"), fog);
    gl.uniform1f(put("veil"), veil);
    gl.uniform1f(put("swell"), scene.blocks ? 0 : 0.25);
    gl.uniform2f(put("size"), width, height);
    gl.uniform1f(put("thick"), thick);
    gl.uniform1f(put("least"), 1.1 * scale);
    gl.uniform1f(put("radius"), radius);
  };
  const girth = scene.radius * (scene.blocks ? 0.16 : 0.32);
  const veil = lit ? 0.78 : 0; // over all but what is under the pointer
  set(linkProgram, 0.72, veil, girth, 0); links.draw(); axes.draw();
  set(nodeProgram, 0.72, veil, 0, scene.radius); nodes.draw();
  // What failed is seen through everything.
  gl.clear(gl.DEPTH_BUFFER_BIT);
  set(linkProgram, 0.3, veil, girth, 0); badLinks.draw();
  set(nodeProgram, 0.3, veil, 0, scene.radius); badNodes.draw();
  if (lit) {
    gl.clear(gl.DEPTH_BUFFER_BIT);
    set(linkProgram, 0, 0, 1.7 * girth, 0); litLinks.draw();
    set(nodeProgram, 0, 0, 0, scene.radius * 1.2); litNodes.draw();
  }
  // Of captions that would overlap the first is shown; zooming in brings up the others.
  const shown = [];
  captions.forEach(([element, place, wide, high]) => {
    const [x, y] = project(place);
    const hidden = shown.some(([u, v, w, h]) => Math.abs(x - u) < (wide + w) / 2 && Math.abs(y - v) < (high + h) / 2);
    element.style.visibility = hidden ? "hidden" : "visible";
    if (!hidden) shown.push([x, y, wide, high]);
    element.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px) translate(-50%, -50%)`;
  });
  if (!under && held) tell(held, ...project(held.node !== undefined ? at(held.node) : lines[held.link][lines[held.link].length >> 1]));
}
if (!scene.blocks) { // from the first caption's place to the others'
  const [corner, ...ends] = scene.captions.map(([, ...place]) => place);
  axes.fill(ends.flatMap((end) => [...corner, ...end, 0.5, 0.55, 0.62, 0, 0, 0, 0.3]));
}
const captions = scene.captions.map(([text, ...place]) => {
  const element = document.createElement("span");
  element.className = "caption";
  element.textContent = text;
  $("captions").append(element);
  return [element, place, element.offsetWidth, element.offsetHeight];
});

// ---- what is under the pointer ---------------------------------------------------------------
function pick(x, y) {
  let best = null, nearest = Infinity;
  const half = view.height / 2 / TAN;
  for (let i = 0; i < N; i++) {
    if (!nodeShown(i)) continue;
    const [px, py, w] = project(at(i));
    if (w < nearest && Math.hypot(px - x, py - y) < Math.max(4, 1.15 * scene.radius * half / w)) { best = { node: i }; nearest = w; }
  }
  if (best) return best;
  let closest = 6;
  for (let l = 0; l < L; l++) {
    if (!linkShown(l)) continue;
    for (const line of pieces(l, shown.hoops || cut.has(l))) {
      let before = project(line[0]);
      for (const point of line.slice(1)) {
        const now = project(point);
        const dx = now[0] - before[0], dy = now[1] - before[1], norm = dx * dx + dy * dy || 1;
        const t = Math.min(1, Math.max(0, ((x - before[0]) * dx + (y - before[1]) * dy) / norm));
        // Of two as close, the one in front.
        const away = Math.hypot(before[0] + t * dx - x, before[1] + t * dy - y) + (before[2] - view.near) / (view.far - view.near);
        if (away < closest) { closest = away; best = { link: l }; }
        before = now;
      }
    }
  }
  return best;
}
function row(cells, name) {
  const tr = document.createElement("tr");
  if (name) tr.className = name;
  for (const text of cells) tr.append(Object.assign(document.createElement("td"), { textContent: text }));
  return tr;
}
const DIMENSION = ["x", "y", "z"];
function tell(what, x, y) {
  const tip = $("tip"), title = document.createElement("b"), table = document.createElement("table");
  tip.replaceChildren(title, table);
  if (what.link !== undefined) {
    const l = what.link;
    title.textContent = `${scene.labels[scene.tail[l]]} \u2192 ${scene.labels[scene.head[l]]}`;
    table.append(row(["link", `${scene.kinds[scene.kind[l]]}, along ${DIMENSION[scene.dimension[l]]}`]));
    if (cut.has(l)) table.append(row(["state", scene.cutText], "cut"));
    scene.values.forEach((value, v) => {
      const [ahead, back] = valueOf(v, l);
      const text = Math.abs(ahead - back) < 1e-6 * most[v] ? figure(ahead) : `${figure(ahead)} there, ${figure(back)} back`;
      table.append(row([value.name, `${text} of at most ${figure(most[v])}`]));
    });
  } else {
    const i = what.node;
    title.textContent = scene.labels[i];
    if (scene.blocks) table.append(row(["slice", scene.groups[scene.group[i]].name]));
    if (failedNode.has(i)) table.append(row(["state", "failed"], "cut"));
    const order = (l) => 2 * scene.dimension[l] + (scene.tail[l] !== i);
    for (const l of [...linksOf[i]].sort((l, m) => order(l) - order(m))) {
      const out = scene.tail[l] === i, other = out ? scene.head[l] : scene.tail[l];
      const load = scene.values.length ? figure(valueOf(choice[2] ?? 0, l)[out ? 0 : 1]) : "";
      table.append(row([(out ? "+" : "\u2212") + DIMENSION[scene.dimension[l]], scene.labels[other], cut.has(l) && !scene.blocks ? "failed" : load, scene.kind[l] ? scene.kinds[scene.kind[l]] : ""], cut.has(l) ? "cut" : ""));
    }
  }
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.transform = `translate(${Math.max(6, Math.min(x + 16, view.width - w - 6))}px, ${Math.max(6, y + 16 + h > view.height ? y - h - 14 : y + 16)}px)`;
}
function hover(event) {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const found = pick(x, y);
  if (found?.node !== under?.node || found?.link !== under?.link) { under = found; light(); }
  canvas.style.cursor = found ? "pointer" : "";
  if (found) tell(found, x, y); else if (!held) $("tip").hidden = true;
}

// ---- mouse, fingers, keys --------------------------------------------------------------------
const fingers = new Map();
let moved = false;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  moved = false;
});
canvas.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) { hover(event); return; }
  const dx = event.clientX - before[0], dy = event.clientY - before[1];
  if (!moved && Math.hypot(dx, dy) < 3) return;
  moved = true;
  under = null;
  $("tip").hidden = true;
  if (fingers.size === 2) {
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const span = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
    zoom(span([event.clientX, event.clientY]) / Math.max(1, span(before)));
  } else if (event.shiftKey || event.buttons === 2) move(dx, dy);
  else turn(-dx * 0.007, dy * 0.007);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  light();
});
const release = (event) => {
  if (fingers.delete(event.pointerId) && !moved && event.type === "pointerup") { held = pick(event.offsetX, event.offsetY); light(); }
};
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => { if (under) { under = null; light(); } if (!held) $("tip").hidden = true; });
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY * 0.0012)); }, { passive: false });

function turn(yaw, pitch) { camera.yaw += yaw; camera.pitch = Math.max(-1.57, Math.min(1.57, camera.pitch + pitch)); inMotion(); }
function zoom(by) { camera.zoom = Math.max(0.3, Math.min(30, camera.zoom * by)); inMotion(); }
function move(dx, dy) {
  const pixel = view.distance * TAN * 2 / view.height;
  camera.target = camera.target.map((t, d) => t - (view.right[d] * dx - view.above[d] * dy) * pixel);
  inMotion();
}
function begin() { Object.assign(camera, START, { zoom: 1, target: [0, 0, 0] }); held = null; $("tip").hidden = true; light(); }
function along(d) {
  if (d === up) camera.pitch = 1.57; else Object.assign(camera, { pitch: 0, yaw: d === (up + 1) % 3 ? 0 : Math.PI / 2 });
  redraw();
}
const KEYS = {
  ArrowLeft: () => turn(0.08, 0), ArrowRight: () => turn(-0.08, 0), ArrowUp: () => turn(0, 0.08), ArrowDown: () => turn(0, -0.08),
  "+": () => zoom(1.15), "=": () => zoom(1.15), "-": () => zoom(1 / 1.15), 0: begin, Home: begin,
  x: () => along(0), y: () => along(1), z: () => along(2), t: () => theme(), Escape: () => { held = null; $("tip").hidden = true; light(); },
};
window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|BUTTON/.test(event.target.tagName)) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});

// ---- the panel -------------------------------------------------------------------------------
function theme(to) {
  const root = document.documentElement;
  root.dataset.theme = to ?? (root.dataset.theme === "dark" ? "light" : "dark");
  window.dispatchEvent(new Event("themechange"));
  redraw();
}
const wish = matchMedia("(prefers-color-scheme: dark)");
theme(wish.matches ? "dark" : "light");
wish.addEventListener("change", () => theme(wish.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => theme());

function sample(colour, kind) {
  const path = kind ? "M2 12 C 8 0, 22 0, 28 12" : "M2 8 H28";
  return `<svg width="30" height="14"><path d="${path}" fill="none" stroke="${colour}" stroke-width="2.5" ${kind === 2 ? 'stroke-dasharray="5 3.5"' : ""}/></svg>`;
}
const MEANING = ["inside the box", "from the end of a dimension to its beginning", "the same, with a shift along another"];
function legend() {
  const list = $("legend"), v = choice[2], kinds = [0, 1, 2].filter((k) => scene.kind.includes(k));
  const shade = (k) => v === null && choice[0] === "kind of link" ? scene.colours.kinds[k] : "currentColor";
  list.innerHTML = kinds.map((k) => `<li>${sample(shade(k), k)}<span>${scene.kinds[k]}: ${MEANING[k]}</span></li>`).join("");
  if (cut.size) list.innerHTML += `<li><svg width="30" height="14"><path d="M2 7 H28" stroke="${scene.colours.failed}" stroke-width="3.5" stroke-dasharray="3 2.5"/></svg><span>${scene.cutText}</span></li>`;
  if (failedNode.size) list.innerHTML += `<li><svg width="30" height="14"><rect x="9" y="1" width="12" height="12" rx="2" fill="${scene.colours.failed}"/><path d="M11 3 L19 11 M19 3 L11 11" stroke="#fff" stroke-width="2"/></svg><span>failed ${scene.nodes}</span></li>`;
  $("scale").hidden = $("ends").hidden = v === null;
  if (v === null) return;
  $("scale").style.background = `linear-gradient(to right, ${scene.colours.load.join(", ")})`;
  $("ends").innerHTML = [0, 0.5, 1].map((t) => `<span>${figure(t * most[v])}</span>`).join("");
}
choices.forEach(([name], i) => $("colour").add(new Option(`colour: ${scene.values.some((v) => v.name === name) ? scene.valueText : ""}${name}`, i)));
$("colour").addEventListener("change", () => { choice = choices[$("colour").value]; legend(); build(); });
function box(text, on, change) {
  const label = document.createElement("label"), input = Object.assign(document.createElement("input"), { type: "checkbox", checked: on });
  input.addEventListener("change", () => { change(input.checked); build(); });
  label.append(input, text);
  $("kinds").append(label);
}
[0, 1, 2].filter((k) => scene.kind.includes(k)).forEach((k) => box(scene.kinds[k], true, (on) => { shown.kind[k] = on; }));
DIMENSION.forEach((name, d) => { if (scene.dimension.includes(d)) box(name, true, (on) => { shown.dimension[d] = on; }); });
if (bent) box("whole hoops", shown.hoops, (on) => { shown.hoops = on; });
if (!scene.blocks) levels.forEach((values, d) => {
  if (values.length < 2) return;
  const range = Object.assign(document.createElement("input"), { type: "range", min: 0, max: values.length - 1, value: values.length - 1 });
  const output = document.createElement("output");
  const say = () => { output.textContent = limit[d] ? `0 \u2013 ${limit[d]}` : "0"; };
  range.setAttribute("aria-label", `chips up to this ${DIMENSION[d]}`);
  range.addEventListener("input", () => { limit[d] = +range.value; say(); build(); });
  say();
  $("peel").append(DIMENSION[d], range, output);
});
new ResizeObserver(draw).observe(canvas); // at once, or the old picture is seen stretched
window.view = { project: (i) => project(at(i)).slice(0, 2), middle: (l) => project(lines[l][lines[l].length >> 1]).slice(0, 2), camera };
legend();
dirty = false;
build();
begin();
look();
})();

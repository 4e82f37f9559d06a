"use strict";
// One state, one draw(). A pick is "time,head,layer", "*" where all are averaged; every map and row is found by its pick.

const $ = (selector, root = document) => root.querySelector(selector);
const data = JSON.parse($("#header").textContent);
const KINDS = ["time", "head", "layer"];
const TITLES = { time: data.steps ? "Step" : "Time group", head: "Head", layer: "Layer" };
const LEVELS = { time: data.steps ? "TLAM · steps" : "TLAM · time groups", head: "HLAM · heads", layer: "LLAM · layers" };
const MAP_NAMES = {
  r2g: "R2G: what the reference influenced",
  g2r: "G2R: what the reference contributed",
  mass: "Mass: share of attention on the reference",
};
const OTHER = { generated: "reference", reference: "generated" };
const BICUBIC = -0.75; // torch's, and so the package's own

const state = {
  pick: { time: null, head: null, layer: null },
  frame: 0, // of a video
  place: null, // {side, cell: [row, column], kept} or {region}
  direction: "r2g",
  level: "time",
  colours: Object.keys(data.colours)[0],
  opacity: 0.7,
  range: "each",
  outline: true,
  box: true,
};
let bytes, floats;
const frame = () => data.frames[state.frame];
const film = [$("#generated .stage img").getAttribute("src"), ...data.film]; // a picture a frame, or one for all

async function inflate(id) {
  const text = $("#" + id).textContent.trim();
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// ---------------------------------------------------------------------------------------------------------- finding

const keyOf = (pick) => KINDS.map((kind) => pick[kind] ?? "*").join(",");

/** {grid: [h, w], values} of a map, or null where nothing ran. */
function mapAt(direction, pick) {
  const found = frame().maps[direction]?.[keyOf(pick)];
  if (!found) return null;
  const n = found.grid[0] * found.grid[1];
  const step = (found.high - found.low) / 255;
  return { grid: found.grid, values: Float32Array.from(bytes.subarray(found.at, found.at + n), (b) => found.low + b * step) };
}

/** {grid, values} of one row of the attention. */
function rowAt(slices, row, pick) {
  const found = slices[keyOf(pick)];
  if (!found) return null;
  const n = found.grid[0] * found.grid[1];
  const step = floats[found.peaks + row] / 255;
  const at = found.at + row * n;
  return { grid: found.grid, values: Float32Array.from(bytes.subarray(at, at + n), (b) => b * step) };
}

/** What is drawn on a side now: {heat, what} or {heat: null, what}. */
function shown(side, pick = state.pick) {
  const place = state.place;
  if (place?.region !== undefined) {
    if (side === "generated") return { heat: null, what: `Registered patch “${place.region}”` };
    return { heat: rowAt(frame().regions[place.region], 0, pick), what: `SRAM of “${place.region}”: where its attention went`, unit: "share of attention" };
  }
  if (place?.side === side) return { heat: null, what: `Cell ${place.cell[0] + 1}, ${place.cell[1] + 1} (row, column)` };
  if (place) {
    const asked = frame().rows[place.side];
    const heat = rowAt(asked.slices, place.cell[0] * asked.cells[1] + place.cell[1], pick);
    const what = side === "reference" ? "SRAM: where that place's attention went" : "Where that piece of the reference went";
    return { heat, what, unit: side === "reference" ? "share of attention" : "share of the column" };
  }
  const direction = side === "generated" ? state.direction : "g2r";
  if (!frame().maps[direction]) return { heat: null, what: "No map on the reference: see the notes", empty: true };
  return { heat: mapAt(direction, pick), what: MAP_NAMES[direction], unit: direction === "mass" ? "of a token's attention" : "mean probability" };
}

const pickedWords = (pick) =>
  KINDS.filter((kind) => pick[kind] !== null)
    .map((kind) => `${TITLES[kind].toLowerCase()} ${data.axes[kind][pick[kind]]}`)
    .join(", ") || "all time groups, heads and layers";

// ---------------------------------------------------------------------------------------------------------- drawing

function cubic(x) {
  x = Math.abs(x);
  if (x <= 1) return ((BICUBIC + 2) * x - (BICUBIC + 3)) * x * x + 1;
  return x < 2 ? ((BICUBIC * x - 5 * BICUBIC) * x + 8 * BICUBIC) * x - 4 * BICUBIC : 0;
}

/** Four neighbours and weights of each of n outputs over m inputs, pixel centres aligned, edges repeated. */
function taps(m, n) {
  const index = new Int32Array(4 * n), weight = new Float32Array(4 * n);
  for (let i = 0; i < n; i++) {
    const centre = ((i + 0.5) * m) / n - 0.5, first = Math.floor(centre) - 1;
    for (let t = 0; t < 4; t++) {
      index[4 * i + t] = Math.min(Math.max(first + t, 0), m - 1);
      weight[4 * i + t] = cubic(centre - first - t);
    }
  }
  return { index, weight };
}

function resample({ grid: [h, w], values }, height, width) {
  const x = taps(w, width), y = taps(h, height);
  const rows = new Float32Array(h * width), out = new Float32Array(height * width);
  for (let r = 0; r < h; r++)
    for (let c = 0; c < width; c++) {
      let sum = 0;
      for (let t = 0; t < 4; t++) sum += x.weight[4 * c + t] * values[r * w + x.index[4 * c + t]];
      rows[r * width + c] = sum;
    }
  for (let r = 0; r < height; r++)
    for (let t = 0; t < 4; t++) {
      const k = y.weight[4 * r + t], from = y.index[4 * r + t] * width, to = r * width;
      for (let c = 0; c < width; c++) out[to + c] += k * rows[from + c];
    }
  return out;
}

const tables = Object.fromEntries(
  Object.entries(data.colours).map(([name, text]) => [name, Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]),
);

const extent = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);

/** Paints a heat map, in full colours; the canvas's opacity mixes it with the picture. */
function paint(canvas, heat, [low, high], alpha = 255) {
  const { width, height } = canvas, table = tables[state.colours];
  const values = resample(heat, height, width), pixels = new ImageData(width, height);
  const scale = high > low ? 255 / (high - low) : 0;
  for (let i = 0; i < values.length; i++) {
    const c = 3 * Math.min(Math.max(Math.round((values[i] - low) * scale), 0), 255);
    pixels.data[4 * i] = table[c];
    pixels.data[4 * i + 1] = table[c + 1];
    pixels.data[4 * i + 2] = table[c + 2];
    pixels.data[4 * i + 3] = alpha;
  }
  return pixels;
}

const number = (v) => (v === 0 ? "0" : Math.abs(v) >= 0.001 && Math.abs(v) < 1000 ? v.toPrecision(3) : v.toExponential(1));

function drawSide(side) {
  const figure = $("#" + side), { heat, what, unit, empty } = shown(side);
  const canvas = $(".stage canvas", figure), scale = $(".scale", figure);
  const missing = !heat && !empty && state.place?.side !== side && !(state.place?.region !== undefined && side === "generated");
  $(".what", figure).textContent = missing ? `${what}: no step ran here (${pickedWords(state.pick)})` : what;
  $(".stage", figure).classList.toggle("heated", Boolean(heat));
  canvas.style.opacity = state.opacity;
  canvas.hidden = !heat;
  scale.hidden = !heat;
  canvas.dataset.shown = heat ? what : "";
  if (heat) {
    const ends = extent(heat.values);
    canvas.getContext("2d").putImageData(paint(canvas, heat, ends), 0, 0);
    $(".low", scale).textContent = number(ends[0]);
    $(".high", scale).textContent = number(ends[1]);
    $(".unit", scale).textContent = unit + ", own scale";
    const bar = $("canvas", scale), ramp = { grid: [1, 256], values: Float32Array.from({ length: 256 }, (_, i) => i) };
    bar.getContext("2d").putImageData(paint(bar, ramp, [0, 255]), 0, 0);
  }
  drawMarks(side, heat);
}

const MARKS = { // what each mark is, beside a small picture of it
  outline: { generated: "the mask given: the inpainted region", reference: "the mask given: the reference's object" },
  found: { generated: "the object found in R2G" },
  cell: { generated: "the cell asked about", reference: "the cell asked about" },
  peak: { generated: "strongest place", reference: "strongest place" },
};

/** The pointed-at cell, the masks' outlines, the detected box and the strongest place, in units of the picture. */
function drawMarks(side, heat) {
  const parts = [], there = [], place = state.place;
  if (state.outline && data.outlines[side]) {
    there.push("outline");
    parts.push(`<path class="shade" d="${data.outlines[side]}"/><path class="outline" d="${data.outlines[side]}"/>`);
  }
  if (state.box && side === "generated" && data.box && !place) {
    const [t, l, b, r] = data.box;
    there.push("found");
    parts.push(`<rect class="found" x="${l}" y="${t}" width="${r - l}" height="${b - t}"/>`);
  }
  if (place?.side === side) {
    const [rows, columns] = frame().rows[side].cells, [r, c] = place.cell;
    const box = `x="${c / columns}" y="${r / rows}" width="${1 / columns}" height="${1 / rows}"`;
    there.push("cell");
    parts.push(`<rect class="shade" ${box}/><rect class="cell" ${box}/>`);
  } else if (place && heat) {
    const [y, x] = peak(heat);
    const [ry, rx] = [0.018, 0.018].map((v, i) => (i ? v : (v * data.aspect[side][0]) / data.aspect[side][1]));
    there.push("peak");
    parts.push(`<ellipse class="shade" cx="${x}" cy="${y}" rx="${rx}" ry="${ry}"/><ellipse class="peak" cx="${x}" cy="${y}" rx="${rx}" ry="${ry}"/>`);
  }
  $(`#${side} .stage svg`).innerHTML = parts.join("");
  const lines = there.map((mark) => `<li><i class="${mark}"></i>${MARKS[mark][side]}</li>`);
  const legend = $(`#${side} .legend`);
  if (legend.dataset.shown !== lines.join("")) legend.innerHTML = legend.dataset.shown = lines.join("");
}

/** Centre of the strongest token, in units of the picture: [y, x]. */
function peak({ grid: [h, w], values }) {
  const best = values.indexOf(values.reduce((a, b) => Math.max(a, b), -Infinity));
  return [(Math.floor(best / w) + 0.5) / h, ((best % w) + 0.5) / w];
}

function announce() {
  const place = state.place;
  if (!place) return say("");
  const target = place.region !== undefined ? "reference" : OTHER[place.side];
  const { heat } = shown(target);
  const from = place.region !== undefined ? `“${place.region}”` : `${place.side}, row ${place.cell[0] + 1}, column ${place.cell[1] + 1}`;
  if (!heat) return say(`${from}: no step ran here`);
  const [y, x] = peak(heat), total = heat.values.reduce((a, b) => a + b, 0), high = extent(heat.values)[1];
  const lift = total > 0 ? (high * heat.values.length) / total : 0;
  say(`${from} → ${target}: strongest ${Math.round(100 * y)} % down, ${Math.round(100 * x)} % across, ${lift.toFixed(1)} × the mean${place.kept ? " (kept)" : ""}`);
}
const say = (text) => ($("#said").textContent = text);

// ------------------------------------------------------------------------------------------------------------ strip

/** The level's panels for what is drawn on the side of interest, each a button that picks it. */
function drawStrip() {
  if (!state.level) return;
  const side = state.place ? (state.place.region !== undefined ? "reference" : OTHER[state.place.side]) : state.direction === "g2r" || state.strip === "g2r" ? "reference" : "generated";
  const kind = state.level, labels = data.axes[kind], base = state.place ? null : state.strip ?? state.direction;
  const panels = labels.map((label, i) => {
    const pick = { ...state.pick, [kind]: i };
    const fixed = KINDS.filter((k) => pick[k] !== null).length;
    const used = fixed > data.order ? { time: null, head: null, layer: null, [kind]: i } : pick;
    return { label, i, heat: base ? mapAt(base, used) : shown(side, used).heat };
  });
  const finite = panels.filter((p) => p.heat);
  const common = finite.map((p) => extent(p.heat.values)).reduce(([a, b], [c, d]) => [Math.min(a, c), Math.max(b, d)], [Infinity, -Infinity]);
  const [W, H] = data.aspect[side], width = Math.round(Math.min(1, W / H) * 176), height = Math.round((width * H) / W);
  const strip = $("#strip");
  strip.setAttribute("aria-label", LEVELS[kind]);
  while (strip.children.length > panels.length) strip.lastChild.remove();
  panels.forEach(({ label, i, heat }, n) => {
    const button = strip.children[n] ?? strip.appendChild(panelButton());
    const ends = heat && (state.range === "shared" ? common : extent(heat.values));
    button.onclick = () => choose(kind, state.pick[kind] === i ? null : i);
    button.setAttribute("aria-pressed", state.pick[kind] === i);
    button.title = kind === "layer" ? data.layerNames[i] : "";
    $(".label", button).textContent = `${TITLES[kind]} ${label}`;
    $(".range", button).textContent = heat ? `${number(ends[0])} – ${number(ends[1])}` : "no step";
    const canvas = $("canvas", button);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.filter = "grayscale(1)";
    context.drawImage($(`#${side} .stage img`), 0, 0, width, height);
    context.filter = "none";
    if (!heat) return;
    const layer = new OffscreenCanvas(width, height);
    layer.getContext("2d").putImageData(paint(canvas, heat, ends), 0, 0);
    context.globalAlpha = state.opacity;
    context.drawImage(layer, 0, 0);
    context.globalAlpha = 1;
  });
  const subject = base ? MAP_NAMES[base] : shown(side).what;
  $("#strip-what").textContent = `${subject}; ${state.range === "shared" ? "one scale for all" : "each on its own scale: range below it"}`;
}

function panelButton() {
  const button = document.createElement("button");
  button.type = "button";
  button.innerHTML = '<canvas aria-hidden="true"></canvas><span class="label"></span><span class="range"></span>';
  return button;
}

// ---------------------------------------------------------------------------------------------------------- choosing

let pending = 0;
function draw() {
  pending ||= requestAnimationFrame(() => {
    pending = 0;
    drawSide("generated");
    drawSide("reference");
    drawStrip();
    syncControls();
    announce();
    document.documentElement.dataset.ready = "true";
  });
}

/** Picks; where the file holds too few combinations, the other picks are let go, and the page says so. */
function choose(kind, value) {
  state.pick[kind] = value;
  const others = KINDS.filter((k) => k !== kind && state.pick[k] !== null);
  const dropped = value === null ? [] : others.slice(0, Math.max(others.length + 1 - data.order, 0));
  for (const k of dropped) state.pick[k] = null;
  $("#dropped").textContent = dropped.length ? `${dropped.map((k) => TITLES[k].toLowerCase()).join(" and ")} let go: this file holds ${["none", "one", "two"][data.order]} at once` : "";
  draw();
}

// -------------------------------------------------------------------------------------------------------- playing

let clock = null;
const PLAY_MS = { time: 700, frame: 250 }; // a time group, a frame
const PLAY = { time: data.steps ? "▶ Play the steps" : "▶ Play over time", frame: "▶ Play the frames" };
const NEXT = {
  time: () => choose("time", state.pick.time === null ? 0 : (state.pick.time + 1) % data.axes.time.length),
  frame: () => showFrame((state.frame + 1) % data.frames.length),
};
let playing = null;

/** The time groups, or the frames, one after the other, until it is pressed again or a slider is moved. */
function play(what) {
  stop();
  playing = what;
  clock = setInterval(NEXT[what], PLAY_MS[what]);
  NEXT[what]();
  syncPlay();
}

function stop() {
  clearInterval(clock);
  clock = playing = null;
  syncPlay();
}

function syncPlay() {
  for (const [what, id] of [["time", "#play"], ["frame", "#play-frames"]]) {
    const button = $(id);
    if (!button) continue;
    button.textContent = playing === what ? "❚❚ Pause" : PLAY[what];
    button.setAttribute("aria-pressed", playing === what);
  }
  $("#said").setAttribute("aria-live", clock === null ? "polite" : "off");
}

function playButton(id, what, after) {
  const button = Object.assign(document.createElement("button"), { type: "button", id });
  button.onclick = () => (playing === what ? stop() : play(what));
  after.after(button);
}

function buildPlay() {
  if ($("#pick-time")) playButton("play", "time", $("#pick-time").parentElement);
  if ($("#pick-frame")) playButton("play-frames", "frame", $("#pick-frame").parentElement);
  syncPlay();
}

function showFrame(index) {
  state.frame = index;
  const img = $("#generated .stage img"), picture = film[Math.min(index, film.length - 1)];
  if (img.getAttribute("src") === picture) return draw();
  img.setAttribute("src", picture);
  img.decode().catch(() => null).then(draw);
}

function buildFrames() {
  if (data.frames.length < 2) return;
  const label = document.createElement("label");
  label.innerHTML = `Frame <input type="range" id="pick-frame" min="0" max="${data.frames.length - 1}" step="1" value="0"><output></output>`;
  $("#picks").append(label);
  $("input", label).addEventListener("input", (e) => {
    stop();
    showFrame(+e.target.value);
  });
}

function syncControls() {
  const frames = $("#pick-frame");
  if (frames) {
    frames.value = state.frame;
    const text = `${state.frame + 1} of ${data.frames.length}`;
    frames.setAttribute("aria-valuetext", text);
    $("output", frames.parentElement).textContent = text;
  }
  for (const kind of KINDS) {
    const input = $("#pick-" + kind);
    if (!input) continue;
    const value = state.pick[kind];
    const text = value === null ? "all" : kind === "layer" ? data.layerNames[value] : data.axes[kind][value] + (kind === "time" && !data.steps ? " of the run" : "");
    input.value = value === null ? 0 : value + 1;
    input.setAttribute("aria-valuetext", text);
    $("output", input.parentElement).textContent = text;
  }
  $("#clear").disabled = !state.place;
  $("#reset").disabled = !state.place && KINDS.every((kind) => state.pick[kind] === null);
  for (const button of document.querySelectorAll("#regions button")) button.setAttribute("aria-pressed", state.place?.region === button.dataset.region);
}

function buildControls() {
  const picks = $("#picks");
  buildFrames();
  for (const kind of KINDS) {
    if (data.order < 1 || data.axes[kind].length < 2) continue;
    const label = document.createElement("label");
    label.innerHTML = `${TITLES[kind]} <input type="range" id="pick-${kind}" min="0" max="${data.axes[kind].length}" step="1" value="0"><output></output>`;
    picks.append(label);
    $("input", label).addEventListener("input", (e) => {
      stop();
      choose(kind, +e.target.value ? +e.target.value - 1 : null);
    });
  }
  buildPlay();
  picks.hidden = !picks.querySelector("input");
  picks.insertAdjacentHTML("beforeend", '<p id="dropped" class="what" role="status"></p>');
  const direction = $("#direction");
  for (const name of ["r2g", "mass"]) if (frame().maps[name]) direction.add(new Option({ r2g: "R2G: influence", mass: "Mass: attention" }[name], name));
  direction.onchange = () => { state.direction = direction.value; state.strip = null; syncTabs(); draw(); };
  const colours = $("#colours");
  for (const name of Object.keys(data.colours)) colours.add(new Option(name, name));
  colours.onchange = () => { state.colours = colours.value; draw(); };
  $("#opacity").oninput = (e) => { state.opacity = e.target.value / 100; draw(); };
  $("#range").onchange = (e) => { state.range = e.target.value; draw(); };
  for (const [id, present] of [["outline", Object.keys(data.outlines).length], ["box", data.box]]) {
    $(`#${id}-label`).hidden = !present;
    $("#" + id).onchange = (e) => { state[id] = e.target.checked; draw(); };
  }
  for (const name of Object.keys(frame().regions)) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.dataset.region = name;
    button.onclick = () => { state.place = state.place?.region === name ? null : { region: name, kept: true }; draw(); };
    $("#regions").append(button, " ");
    $("#regions").hidden = false;
  }
  $("#clear").onclick = letGo;
  $("#reset").onclick = () => { stop(); for (const kind of KINDS) state.pick[kind] = null; $("#dropped").textContent = ""; letGo(); };
}

function letGo() {
  state.place = null;
  draw();
}

function buildTabs() {
  const tabs = $(".tabs"), kinds = KINDS.filter((kind) => data.order >= 1 && data.axes[kind].length > 1);
  if (!kinds.includes(state.level)) state.level = kinds[0];
  $("#levels").hidden = !kinds.length;
  for (const kind of kinds) {
    const tab = Object.assign(document.createElement("button"), { type: "button", textContent: LEVELS[kind], id: "tab-" + kind });
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "strip");
    tab.onclick = () => { state.level = kind; syncTabs(); draw(); };
    tab.onkeydown = (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (!step) return;
      const next = kinds[(kinds.indexOf(kind) + step + kinds.length) % kinds.length];
      $("#tab-" + next).click();
      $("#tab-" + next).focus();
    };
    tabs.append(tab);
  }
  if (frame().maps.g2r) {
    const both = document.createElement("button");
    Object.assign(both, { type: "button", id: "strip-side", textContent: "Show G2R panels" });
    both.onclick = () => { state.strip = state.strip === "g2r" ? null : "g2r"; syncTabs(); draw(); };
    tabs.append(both);
  }
  syncTabs();
}

function syncTabs() {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const on = tab.id === "tab-" + state.level;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
  }
  const side = $("#strip-side");
  if (side) side.setAttribute("aria-pressed", state.strip === "g2r");
}

// ---------------------------------------------------------------------------------------------------------- pointing

function buildStages() {
  for (const side of ["generated", "reference"]) {
    const stage = $(`#${side} .stage`), [w, h] = data.aspect[side], canvas = $("canvas", stage);
    stage.style.aspectRatio = `${w} / ${h}`;
    stage.style.setProperty("--ratio", w / h);
    const scale = 512 / Math.max(w, h);
    [canvas.width, canvas.height] = [Math.max(Math.round(w * scale), 1), Math.max(Math.round(h * scale), 1)];
    if (!frame().rows[side]) {
      stage.classList.add("blind");
      stage.removeAttribute("tabindex");
      stage.setAttribute("role", "group");
      stage.setAttribute("aria-label", stage.querySelector("img").alt);
      continue;
    }
    const [rows, columns] = frame().rows[side].cells;
    const cellAt = (e) => {
      const box = stage.getBoundingClientRect();
      const inside = (v, n) => Math.min(Math.max(Math.floor(v * n), 0), n - 1);
      return [inside((e.clientY - box.top) / box.height, rows), inside((e.clientX - box.left) / box.width, columns)];
    };
    const point = (cell, kept) => {
      const same = state.place?.side === side && state.place.kept === kept && String(state.place.cell) === String(cell);
      if (!same) { state.place = { side, cell, kept }; draw(); }
    };
    stage.addEventListener("pointermove", (e) => {
      if (e.pointerType === "touch" ? stage.hasPointerCapture(e.pointerId) : !state.place?.kept) point(cellAt(e), e.pointerType === "touch");
    });
    stage.addEventListener("pointerdown", (e) => {
      if (e.button) return;
      if (e.pointerType === "touch") stage.setPointerCapture(e.pointerId);
      const cell = cellAt(e), again = state.place?.kept && state.place.side === side && String(state.place.cell) === String(cell);
      if (again) letGo(); else point(cell, true);
    });
    stage.addEventListener("pointerleave", () => { if (state.place && !state.place.kept) letGo(); });
    stage.addEventListener("keydown", (e) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
      if (move) {
        const cell = state.place?.side === side ? state.place.cell : [Math.floor(rows / 2), Math.floor(columns / 2)];
        const start = state.place?.side === side ? move : [0, 0];
        point([Math.min(Math.max(cell[0] + start[0], 0), rows - 1), Math.min(Math.max(cell[1] + start[1], 0), columns - 1)], false);
      } else if ((e.key === "Enter" || e.key === " ") && state.place?.side === side) {
        state.place = { ...state.place, kept: !state.place.kept };
        draw();
      } else return;
      e.preventDefault();
    });
  }
  document.addEventListener("keydown", (e) => { if (e.key === "Escape" && state.place) letGo(); });
}

function buildTables() {
  const scores = $("#scores");
  scores.hidden = !data.scores.length;
  for (const row of data.scores) {
    const line = $("tbody", scores).insertRow();
    for (const text of row) line.insertCell().textContent = text;
  }
  const notes = $("#notes");
  notes.hidden = !data.notes.length;
  for (const text of data.notes) $("ul", notes).append(Object.assign(document.createElement("li"), { textContent: text }));
}

function buildTheme() {
  const button = $("#theme"), root = document.documentElement;
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const sync = () => { button.textContent = dark() ? "Light" : "Dark"; button.setAttribute("aria-pressed", Boolean(root.dataset.theme)); };
  button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; sync(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", sync);
  sync();
}

async function start() {
  buildTheme();
  buildTables();
  buildControls();
  buildTabs();
  buildStages();
  try {
    bytes = new Uint8Array(await inflate("bytes"));
    floats = new Float32Array(await inflate("floats"));
  } catch (error) {
    return say(`This browser can't unpack the maps (${error.message}); any of 2023 or later can.`);
  }
  await Promise.all([...document.querySelectorAll(".stage img")].map((image) => image.decode().catch(() => null)));
  draw();
}
start();

// The page: two clips, the layer that is looked at, and their comparison.

import { Features } from "./npy.js";
import { divergingPalette, drawMatrix, drawScale, drawWaveform, outlineRow } from "./pictures.js";
import { getFeatures, getLimits, getModels, hasKey, query, Refused, setKey } from "./service.js";
import { changes, cosine, frameSimilarity, meanBestMatch, meanVector, quantiles } from "./similarity.js";
import { BANDS, decodeForDisplay, logMel, Recording, SAMPLE_RATE } from "./sound.js";

const FRAME = 0.02, FRAME_SEES = 0.025; // seconds
const $ = (id) => document.getElementById(id);
/** `chosen` is the space and the model of what is shown; `wanted` gives what the controls say, which may yet be refused. */
const state = { layer: 0, layers: 0, limits: {}, models: [], chosen: { space: $("space").value, model: "" } };
const wanted = () => ({ space: $("space").value, model: state.models.length > 1 ? $("model").value : "" });
const seconds = (value) => `${value.toFixed(2)} s`;
const number = (value) => value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "−");

const tagged = (tag, textContent, className = "") => Object.assign(document.createElement(tag), { textContent, className });

// ---- What goes wrong ----

function showError(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
    if (!hasKey()) return; // The field says it all.
  }
  $("alert-text").textContent = error.message;
  $("alert-kind").textContent = error.kind ?? "";
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
}

const clearError = () => { $("alert").hidden = true; };

/** Runs what a user asked for; failures are shown, never thrown away. */
const attempt = (action) => async (...given) => {
  clearError();
  try {
    await action(...given);
  } catch (error) {
    showError(error);
    if (!(error instanceof Refused) && error.name !== "AbortError") console.error(error);
  }
};

// ---- One clip ----

/** Adds what every picture needs of each layer: means over frames, changes from frame to frame, and the largest of these. */
function analysed(features) {
  const layers = Array.from({ length: features.layers }, (_, k) => features.layer(k + 1));
  const means = layers.map((values) => meanVector(values, features.dim)), moves = layers.map((values) => changes(values, features.dim));
  return Object.assign(features, { means, changes: moves, tops: moves.map((row) => quantiles(row, 0, 0.99)[1] || 1) });
}

class Clip {
  constructor(letter) {
    this.letter = letter;
    this.file = this.features = this.samples = this.recording = null;
    this.next = null; // A file that is to be shown, while the service is asked.
    this.told = "";
    this.audio = new Audio();
    this.element = $("clip").content.cloneNode(true).firstElementChild;
    this.element.id = `clip-${letter.toLowerCase()}`;
    this.part = (name) => this.element.querySelector(`.${name}`);
    this.part("clip-title").textContent = `Clip ${letter}`;
    this.part("choose").querySelector("input").setAttribute("aria-label", `Choose a file for clip ${letter}`);
    this.part("record").setAttribute("aria-label", `Record clip ${letter} from the microphone`);
    this.part("time").setAttribute("aria-label", `Time in clip ${letter}`);
    this.listen();
    $("clips").append(this.element);
  }

  listen() {
    const { element, part } = this, input = part("choose").querySelector("input");
    input.addEventListener("change", attempt(async () => {
      const [file] = input.files;
      input.value = ""; // The same file may be chosen again.
      if (file) await this.open(file);
    }));
    part("record").addEventListener("click", attempt(() => this.record()));
    part("save").addEventListener("click", attempt((event) => this.save(this.layer, event.target)));
    part("save-all").addEventListener("click", attempt((event) => this.save("all", event.target)));
    part("time").addEventListener("input", () => this.seek(Number(part("time").value)));
    part("play").addEventListener("click", attempt(() => (this.audio.paused ? this.audio.play() : this.audio.pause())));
    for (const kind of ["play", "pause", "ended"]) {
      this.audio.addEventListener(kind, () => {
        part("play").textContent = this.audio.paused ? "▶" : "❚❚";
        part("play").setAttribute("aria-label", this.audio.paused ? "Play" : "Pause");
        this.follow();
      });
    }
    for (const picture of element.querySelectorAll(".pictures canvas")) {
      const timeAt = (event) => Math.max(0, Math.min(1, event.offsetX / picture.clientWidth)) * this.duration;
      picture.addEventListener("pointermove", (event) => this.audio.paused && this.mark(timeAt(event)));
      picture.addEventListener("pointerleave", () => this.audio.paused && this.mark(Number(part("time").value)));
      picture.addEventListener("click", (event) => this.seek(timeAt(event)));
    }
    part("layers").addEventListener("click", (event) => {
      chooseLayer(1 + Math.min(state.layers - 1, Math.floor((event.offsetY / part("layers").clientHeight) * state.layers)));
    });
  }

  /** Shows an audio file and asks for its features. */
  async open(file) {
    const limit = state.limits.max_bytes;
    if (limit && file.size > limit) {
      throw new Refused(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB; the service takes ${(limit / 2 ** 20).toFixed(0)} MiB.`, "too_large", 413);
    }
    this.audio.pause();
    this.next = file;
    try {
      while (this.next === file) { // Until it is shown, or another takes its place.
        if (switching) {
          await Promise.allSettled([switching]);
          continue;
        }
        try {
          this.show(await this.load(file, state.chosen));
          refresh();
        } catch (error) {
          if (error.name !== "AbortError") throw error; // A change of space or model takes the file along.
        }
      }
    } finally {
      if (this.next === file) this.next = null;
    }
  }

  /** The service's answer to a file, and its sound; nothing is shown of it yet. */
  async load(file, chosen) {
    this.request?.abort();
    const request = (this.request = new AbortController());
    this.element.classList.add("busy");
    this.part("status").textContent = "Asking the service…";
    try {
      const answer = await getFeatures(file, { ...chosen, layer: "all", format: "npy", dtype: "float16" }, request.signal);
      const header = (name) => answer.headers.get(`x-${name}`), milliseconds = (name) => (1000 * Number(header(name))).toFixed(0);
      const features = analysed(new Features(await answer.arrayBuffer()));
      features.origin = `${header("model")}@${header("revision")} ${header("space")}`;
      const told = `${features.frames} frames × ${features.dim} values, ${features.layers} layers · ${milliseconds("inference-time")} ms of inference after ` +
        `${milliseconds("queue-time")} ms in the queue`;
      const samples = file === this.file ? this.samples : await decodeForDisplay(file);
      request.signal.throwIfAborted();
      return { file, features, samples, told };
    } finally {
      if (request === this.request) { // Else a later one goes on.
        this.part("status").textContent = this.told;
        this.element.classList.remove("busy");
      }
    }
  }

  /** Shows what `load` gave. */
  show({ file, features, samples, told }) {
    const before = this.file;
    Object.assign(this, { file, features, samples, told, values: null });
    this.part("status").textContent = told;
    if (this.next === file) this.next = null;
    if (file === before) return;
    URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(file);
    // Without samples the frames tell the length, to within one.
    this.duration = samples ? samples.length / SAMPLE_RATE : (features.frames - 1) * FRAME + FRAME_SEES;
    this.mel = samples && logMel(samples);
    this.peak = samples?.reduce((most, value) => Math.max(most, Math.abs(value)), 0.01);
    this.element.classList.remove("empty");
    this.part("choose-text").textContent = "Replace";
    this.part("choose").classList.remove("primary");
    this.part("time").max = this.duration;
    this.part("play").disabled = !samples;
    this.seek(0);
  }

  /** The layer that is looked at, or the last of a clip with fewer (the service's model may have been replaced between two clips). */
  get layer() {
    return Math.min(state.layer, this.features.layers);
  }

  async record() {
    const button = this.part("record");
    let file = null;
    button.disabled = true; // Until the microphone is on, or off.
    try {
      if (this.recording) file = await this.endRecording(button);
      else await this.beginRecording(button);
    } finally {
      button.disabled = false;
    }
    if (file) await this.open(file);
  }

  async beginRecording(button) {
    this.recording = await Recording.start((level, elapsed) => {
      this.part("recording").querySelector("meter").value = level;
      button.textContent = `Stop (${elapsed.toFixed(1)} s)`;
      if (state.limits.max_seconds && elapsed > state.limits.max_seconds - 0.5 && this.recording) button.click();
    });
    this.audio.pause();
    button.textContent = "Stop";
    button.classList.add("on");
    this.part("recording").hidden = false;
  }

  endRecording(button) {
    const recording = this.recording;
    this.recording = null;
    button.textContent = "Record";
    button.classList.remove("on");
    this.part("recording").hidden = true;
    return recording.stop();
  }

  /** Downloads exact float32 values from the service. */
  async save(layer, button) {
    button.disabled = true;
    try {
      const answer = await getFeatures(this.file, { ...state.chosen, layer, format: "npy" });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = `${this.file.name.replace(/\.[^.]*$/, "")}.${layer === "all" ? "all-layers" : `layer-${layer}`}.npy`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    } finally {
      button.disabled = false;
    }
  }

  seek(at) {
    if (this.samples) this.audio.currentTime = Math.min(at, this.duration);
    this.part("time").value = at;
    this.mark(at);
  }

  /** Moves the cursor with the sound. */
  follow() {
    this.part("time").value = this.audio.currentTime;
    this.mark(this.audio.currentTime);
    if (!this.audio.paused) requestAnimationFrame(() => this.follow());
  }

  /** Puts the cursor at a time and says what is there. */
  mark(at) {
    if (!this.values) return;
    const { frames, dim } = this.features, frame = Math.max(0, Math.min(frames - 1, Math.floor(at / FRAME)));
    this.part("pictures").style.setProperty("--at", at / this.duration);
    this.part("time").setAttribute("aria-valuetext", `${seconds(at)}, frame ${frame}`);
    this.part("of-layers").textContent = `layer ${this.layer}: ${number(this.features.changes[this.layer - 1][frame])}`;
    const values = this.values.subarray(frame * dim, (frame + 1) * dim);
    this.part("of-features").textContent = `${seconds(at)} · frame ${frame} · length ${number(Math.hypot(...values))}`;
  }

  draw() {
    if (!this.features) return;
    const { frames, dim, layers } = this.features, { part, duration, letter, layer } = this, span = [0, (frames * FRAME) / duration];
    part("clip-title").replaceChildren(`Clip ${letter}`, tagged("small", `${this.file.name} · ${seconds(duration)}`));
    part("last-layer").textContent = layers;
    part("last-dim").textContent = dim - 1;
    part("features-title").textContent = `Layer ${layer}`;
    part("features-title").append(tagged("small", "each value against its own mean and deviation"));
    part("save").textContent = `Download layer ${layer}`;
    part("ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((share) => tagged("span", seconds(share * duration))));

    if (this.samples) {
      drawWaveform(part("waveform"), this.samples, this.peak);
      part("peak").textContent = this.peak.toFixed(2);
      part("trough").textContent = `−${this.peak.toFixed(2)}`;
      const { values, columns } = this.mel, [low, high] = quantiles(values, 0.05, 0.998);
      const until = Math.min(1, (columns * 0.01) / duration);
      drawMatrix(part("spectrogram"), BANDS, columns, (row, column) => (values[(BANDS - 1 - row) * columns + column] - low) / (high - low), "magma", [0, until]);
    } else {
      for (const name of ["waveform", "spectrogram"]) part(name).width = part(name).width; // Clears it.
    }
    part("waveform").setAttribute("aria-label", this.samples ? `Waveform of ${this.file.name}` : "This browser can't decode this file for display");
    part("spectrogram").setAttribute("aria-label", this.samples ? `Spectrogram of ${this.file.name}` : "This browser can't decode this file for display");

    this.values = this.features.layer(layer);
    const { changes, tops } = this.features;
    const context = drawMatrix(part("layers"), layers, frames, (row, column) => changes[row][column] / tops[row], "viridis", span);
    outlineRow(context, layer - 1, layers);
    part("layers").setAttribute("aria-label", `How much neighbouring frames differ, for each of ${layers} layers; layer ${layer} is chosen`);

    const mean = this.features.means[layer - 1], deviation = new Float64Array(dim);
    this.values.forEach((value, i) => { deviation[i % dim] += (value - mean[i % dim]) ** 2 / frames; });
    const scale = deviation.map((square) => 1 / (6 * Math.sqrt(square) || 1)); // Three deviations to each side.
    drawMatrix(part("features"), dim, frames, (row, column) => 0.5 + (this.values[column * dim + row] - mean[row]) * scale[row], divergingPalette(), span);
    part("features").setAttribute("aria-label", `Values of layer ${layer}: ${dim} dimensions in ${frames} frames`);
    this.mark(Number(part("time").value));
  }
}

const clips = [];

// ---- Two clips ----

const comparable = () => clips[0].features && clips[0].features.origin === clips[1].features?.origin;

function compare() {
  $("comparison").hidden = !comparable();
  if ($("comparison").hidden) return;
  const [a, b] = clips, dim = a.features.dim;
  const pooled = a.features.means.map((mean, k) => cosine(mean, b.features.means[k]));
  $("pooled").textContent = number(pooled[state.layer - 1]);
  $("pooled-layer").textContent = state.layer;
  $("by-layer").replaceChildren(...pooled.map((value, k) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", k + 1 === state.layer);
    const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, value: Math.max(0, value), ariaHidden: "true" });
    button.append(tagged("span", "Layer ", "unseen"), String(k + 1), meter, number(value));
    button.addEventListener("click", () => {
      focused = k; // The list is made anew.
      chooseLayer(k + 1);
    });
    item.append(button);
    return item;
  }));

  if (focused !== null) $("by-layer").children[focused].firstChild.focus();
  focused = null;

  const found = frameSimilarity(a.values, b.values, dim, $("centred").checked), { values, rows, columns, stride } = found;
  const [low, high] = quantiles(values, 0.01, 0.995);
  const canvas = $("matrix");
  canvas.style.aspectRatio = `${Math.min(3, Math.max(0.75, columns / rows))}`;
  drawMatrix(canvas, rows, columns, (row, column) => (values[row * columns + column] - low) / (high - low || 1), "viridis");
  canvas.setAttribute("aria-label", `Cosine of each frame of clip A with each of clip B at layer ${state.layer}, from ${number(low)} to ${number(high)}`);
  drawScale($("matrix-scale"), "viridis");
  $("matrix-low").textContent = number(low);
  $("matrix-high").textContent = number(high);
  $("matrix-about").textContent = `cosine at layer ${state.layer}${stride > 1 ? `, one frame in ${stride}` : ""}`;
  $("matrix-a").textContent = seconds(a.duration);
  $("matrix-b").textContent = seconds(b.duration);
  $("best-match").textContent = `The best match of a frame of A among B's, whatever its time: ${number(meanBestMatch(found))} on average.`;
  matrix = found;
}

let matrix = null, cell = [0, 0], focused = null;

/** Says what a cell of the matrix is, and marks its times in both clips. */
function readMatrix(column, row) {
  cell = [Math.max(0, Math.min(matrix.columns - 1, column)), Math.max(0, Math.min(matrix.rows - 1, row))];
  const [timeA, timeB] = cell.map((index) => index * matrix.stride * FRAME);
  $("matrix-readout").textContent = `A ${seconds(timeA)} · B ${seconds(timeB)}: ${number(matrix.values[cell[1] * matrix.columns + cell[0]])}`;
  clips[0].mark(timeA);
  clips[1].mark(timeB);
}

// ---- What is looked at ----

let due = 0;

/** Draws everything before the next picture of the screen, once however often it is asked. */
function redraw() {
  due ||= requestAnimationFrame(() => {
    due = 0;
    for (const clip of clips) clip.draw();
    compare();
  });
}

function chooseLayer(layer) {
  state.layer = layer;
  $("layer").value = layer;
  $("layer-value").textContent = `${layer} / ${state.layers}`;
  redraw();
  showCommand();
}

/** After features have come: the controls and the pictures follow. */
function refresh() {
  const loaded = clips.filter((clip) => clip.features);
  $("clips").classList.toggle("some", loaded.length > 0);
  $("clips").classList.toggle("two", loaded.length > 1);
  $("intro").hidden = true;
  $("settings").hidden = $("terminal").hidden = false;
  const before = state.layers;
  state.layers = loaded[0].features.layers;
  $("layer").max = state.layers;
  chooseLayer(before === state.layers ? state.layer : state.layers);
}

let switching = null; // What the last change of space or model waits for.

/** Asks for all clips anew; where one is refused, everything stays as it was. */
const askAgain = attempt(async () => {
  const chosen = wanted(), files = clips.map((clip) => clip.next ?? clip.file), members = clips.filter((_, i) => files[i]);
  const mine = (switching = Promise.all(clips.flatMap((clip, i) => (files[i] ? clip.load(files[i], chosen) : []))));
  try {
    const found = await mine;
    state.chosen = chosen;
    members.forEach((clip, i) => clip.show(found[i]));
    refresh();
  } catch (error) {
    if (mine === switching) { // Else a later change goes on.
      for (const clip of members) clip.request.abort();
      showChosen();
    }
    throw error;
  } finally {
    if (mine === switching) switching = null;
  }
});

function showChosen() {
  for (const [name, value] of Object.entries(state.chosen)) if (value) $(name).value = value;
}

function showCommand() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`, { file } = clips.find((clip) => clip.file);
  const address = new URL(`v1/features?${query({ layer: state.layer, ...state.chosen, format: "npy" })}`, location.href);
  const key = hasKey() ? ` -H "Authorization: Bearer $KEY"` : "";
  $("command").textContent = `curl${key} --data-binary @${quoted(file.name)} ${quoted(address.href)} -o features.npy`;
}

// ---- Start ----

async function start() {
  state.limits = await getLimits();
  const { max_seconds: longest, max_bytes: largest } = state.limits;
  const limits = [longest && `up to ${longest} s`, largest && `${Math.round(largest / 2 ** 20)} MiB`].filter(Boolean).join(", ");
  for (const line of document.querySelectorAll(".limits")) line.textContent = `wav, flac, ogg, opus or mp3${limits && `; ${limits}`}`;
  state.models = await getModels();
  $("key-form").hidden = true;
  $("model").replaceChildren(...state.models.map(({ id }) => new Option(id, id)));
  $("model-field").hidden = state.models.length < 2;
  state.chosen.model ||= wanted().model;
  showChosen();
  const [{ id, layers, dim, revision }] = state.models;
  $("model-line").textContent = state.models.length > 1 ? `${state.models.length} models` : `${id} · ${layers} layers × ${dim} · revision ${revision}`;
}

clips.push(new Clip("A"), new Clip("B"));

$("alert-close").addEventListener("click", clearError);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  attempt(start)();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("layer").addEventListener("input", () => chooseLayer(Number($("layer").value)));
$("space").addEventListener("change", askAgain);
$("model").addEventListener("change", askAgain);
$("centred").addEventListener("change", compare);
$("copy").hidden = !navigator.clipboard; // Which pages over plain http lack.
$("copy").addEventListener("click", attempt(async () => {
  await navigator.clipboard.writeText($("command").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
}));
$("matrix").addEventListener("pointermove", ({ offsetX, offsetY, target }) => {
  readMatrix(Math.floor((offsetX / target.clientWidth) * matrix.columns), Math.floor((offsetY / target.clientHeight) * matrix.rows));
});
$("matrix").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  readMatrix(cell[0] + step[0], cell[1] + step[1]);
});

// Files may be dropped anywhere: on a clip for that clip, elsewhere for the first free one.
const clipUnder = (event) => clips.find((clip) => clip.element.contains(event.target)) ?? clips.find((clip) => !clip.file) ?? clips[1];
addEventListener("dragover", (event) => {
  event.preventDefault();
  for (const clip of clips) clip.element.classList.toggle("over", clip === clipUnder(event));
});
for (const kind of ["dragleave", "drop"]) {
  addEventListener(kind, () => clips.forEach((clip) => clip.element.classList.remove("over")));
}
addEventListener("drop", (event) => {
  event.preventDefault();
  const files = [...(event.dataTransfer?.files ?? [])], first = clipUnder(event);
  attempt(async () => {
    if (files.length > 2) throw new Error(`Drop one file or two, not ${files.length}.`);
    if (files.length === 2) await Promise.all(files.map((file, i) => clips[i].open(file)));
    else if (files.length) await first.open(files[0]);
  })();
});

new ResizeObserver(redraw).observe($("clips"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
attempt(start)();

// The page: two clips, the selected layer, and their comparison.

import { LiveView } from "./live.js";
import { Features } from "./npy.js";
import { divergingPalette, drawMatrix, drawScale, drawWaveform, outlineRow } from "./pictures.js";
import { getFeatures, getLimits, getModels, hasKey, query, ServiceError, setKey } from "./service.js";
import { bestMatch, changes, frameSimilarity, meanVector, quantiles } from "./similarity.js";
import { BANDS, decodeForDisplay, logMel, Recording, SAMPLE_RATE } from "./sound.js";

const FRAME_SHIFT = 0.02, FRAME_LENGTH = 0.025; // seconds
const $ = (id) => document.getElementById(id);
/** `shown` is the space and the model of the features on the page; `selection` reads those of the controls, which may be refused. */
const state = { layer: 0, layers: 0, limits: {}, models: [], shown: { space: $("space").value, model: "" } };
const selection = () => ({ space: $("space").value, model: state.models.length > 1 ? $("model").value : "" });
const seconds = (value) => `${value.toFixed(2)} s`;
const number = (value) => value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "−");

const tagged = (tag, textContent, className = "") => Object.assign(document.createElement(tag), { textContent, className });

// ---- Errors ----

function showError(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
    if (!hasKey()) return; // The form explains what is needed.
  }
  $("alert-text").textContent = error.message;
  $("alert-kind").textContent = error.kind ?? "";
  $("alert").hidden = false;
  $("alert").scrollIntoView({ block: "nearest" });
}

const clearError = () => { $("alert").hidden = true; };

/** Wraps an action of the user so that its errors are shown. */
const attempt = (action) => async (...args) => {
  clearError();
  try {
    await action(...args);
  } catch (error) {
    showError(error);
    if (!(error instanceof ServiceError) && error.name !== "AbortError") console.error(error);
  }
};

// ---- One clip ----

/** Adds to each layer what the pictures need: its mean over frames, the changes between frames, and the largest of these. */
function analyse(features) {
  const layers = Array.from({ length: features.layers }, (_, k) => features.layer(k + 1));
  const means = layers.map((values) => meanVector(values, features.dim)), changesByLayer = layers.map((values) => changes(values, features.dim));
  return Object.assign(features, { means, changes: changesByLayer, tops: changesByLayer.map((row) => quantiles(row, 0, 0.99)[1] || 1) });
}

class Clip {
  constructor(letter) {
    this.letter = letter;
    this.file = this.features = this.samples = this.recording = null;
    this.next = null; // The file that will be shown after the response of the service.
    this.summary = "";
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
      input.value = ""; // Allows the same file to be chosen again.
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

  /** Requests the features of an audio file and shows them. */
  async open(file) {
    const limit = state.limits.max_bytes;
    if (limit && file.size > limit) {
      throw new ServiceError(`Clip ${this.letter}: ${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MiB, but the service accepts at most ${(limit / 2 ** 20).toFixed(0)} MiB.`, "too_large", 413);
    }
    this.audio.pause();
    this.next = file;
    try {
      while (this.next === file) { // Until the file is shown or replaced by another.
        if (switching) {
          await Promise.allSettled([switching]);
          continue;
        }
        try {
          this.show(await this.load(file, state.shown));
          refresh();
        } catch (error) {
          if (error.name !== "AbortError") throw error; // A change of space or model aborts the request; the file is then sent again.
        }
      }
    } finally {
      if (this.next === file) this.next = null;
    }
  }

  /** Returns the features and samples of a file, without showing them yet. */
  async load(file, selected) {
    this.request?.abort();
    const request = (this.request = new AbortController());
    this.element.classList.add("busy");
    this.part("status").textContent = "Computing features…";
    try {
      const response = await getFeatures(file, { ...selected, layer: "all", format: "npy", dtype: "float16" }, request.signal);
      const header = (name) => response.headers.get(`x-${name}`), milliseconds = (name) => (1000 * Number(header(name))).toFixed(0);
      const features = analyse(new Features(await response.arrayBuffer()));
      features.origin = `${header("model")}@${header("revision")} ${header("space")}`;
      const summary = `${features.frames} frames × ${features.dim} values, ${features.layers} layers · ${milliseconds("inference-time")} ms of inference after ` +
        `${milliseconds("queue-time")} ms in the queue`;
      const samples = file === this.file ? this.samples : await decodeForDisplay(file);
      request.signal.throwIfAborted();
      return { file, features, samples, summary };
    } catch (error) {
      if (error instanceof ServiceError && error.status !== 401) error.message = `Clip ${this.letter}, ${file.name}: ${error.message}`;
      throw error;
    } finally {
      if (request === this.request) { // Otherwise a later request is running.
        this.part("status").textContent = this.summary;
        this.element.classList.remove("busy");
      }
    }
  }

  /** Shows the result of `load`. */
  show({ file, features, samples, summary }) {
    const before = this.file;
    Object.assign(this, { file, features, samples, summary, values: null });
    this.part("status").textContent = summary;
    if (this.next === file) this.next = null;
    if (file === before) return;
    URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(file);
    // Without samples, the number of frames gives the duration to within one frame.
    this.duration = samples ? samples.length / SAMPLE_RATE : (features.frames - 1) * FRAME_SHIFT + FRAME_LENGTH;
    this.mel = samples && logMel(samples);
    this.peak = samples?.reduce((most, value) => Math.max(most, Math.abs(value)), 0.01);
    this.element.classList.remove("empty");
    this.part("choose-text").textContent = "Replace";
    this.part("choose").classList.remove("primary");
    this.part("time").max = this.duration;
    this.part("play").disabled = !samples;
    this.seek(0);
  }

  /** The selected layer, or the last one of a clip with fewer layers (the model may have been replaced between two clips). */
  get layer() {
    return Math.min(state.layer, this.features.layers);
  }

  async record() {
    const button = this.part("record");
    let file = null;
    button.disabled = true; // Until the microphone has started or stopped.
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
    this.live = new LiveView(this.part("live"), { ...state.shown, layer: state.layer || "last" });
    this.live.start(this.recording);
  }

  endRecording(button) {
    const recording = this.recording;
    this.recording = null;
    button.textContent = "Record";
    button.classList.remove("on");
    this.part("recording").hidden = true;
    this.live.stop();
    return recording.stop();
  }

  /** Downloads the exact float32 values from the service. */
  async save(layer, button) {
    button.disabled = true;
    try {
      const response = await getFeatures(this.file, { ...state.shown, layer, format: "npy" });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await response.blob());
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

  /** Moves the cursor during playback. */
  follow() {
    this.part("time").value = this.audio.currentTime;
    this.mark(this.audio.currentTime);
    if (!this.audio.paused) requestAnimationFrame(() => this.follow());
  }

  /** Moves the cursor to a time and shows the values there. */
  mark(at) {
    if (!this.values) return;
    const { frames, dim } = this.features, frame = Math.max(0, Math.min(frames - 1, Math.floor(at / FRAME_SHIFT)));
    this.part("pictures").style.setProperty("--at", at / this.duration);
    this.part("time").setAttribute("aria-valuetext", `${seconds(at)}, frame ${frame}`);
    this.part("of-layers").textContent = `layer ${this.layer}: ${number(this.features.changes[this.layer - 1][frame])}`;
    const values = this.values.subarray(frame * dim, (frame + 1) * dim);
    this.part("of-features").textContent = `${seconds(at)} · frame ${frame} · length ${number(Math.hypot(...values))}`;
  }

  draw() {
    if (!this.features) return;
    const { frames, dim, layers } = this.features, { part, duration, letter, layer } = this, span = [0, (frames * FRAME_SHIFT) / duration];
    part("clip-title").replaceChildren(`Clip ${letter}`, tagged("small", `${this.file.name} · ${seconds(duration)}`));
    part("last-layer").textContent = layers;
    part("last-dim").textContent = dim - 1;
    part("features-title").textContent = `Layer ${layer}`;
    part("features-title").append(tagged("small", "blue below, red above the mean"));
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
      for (const name of ["waveform", "spectrogram"]) part(name).width = part(name).width; // Clears the canvas.
    }
    part("waveform").setAttribute("aria-label", this.samples ? `Waveform of ${this.file.name}` : "This browser can't decode the file for display");
    part("spectrogram").setAttribute("aria-label", this.samples ? `Spectrogram of ${this.file.name}` : "This browser can't decode the file for display");

    this.values = this.features.layer(layer);
    const { changes, tops } = this.features;
    const context = drawMatrix(part("layers"), layers, frames, (row, column) => changes[row][column] / tops[row], "viridis", span);
    outlineRow(context, layer - 1, layers);
    part("layers").setAttribute("aria-label", `Difference between neighbouring frames for each of ${layers} layers; layer ${layer} is selected`);

    const mean = this.features.means[layer - 1], deviation = new Float64Array(dim);
    this.values.forEach((value, i) => { deviation[i % dim] += (value - mean[i % dim]) ** 2 / frames; });
    const scale = deviation.map((square) => 1 / (6 * Math.sqrt(square) || 1)); // The colours cover three standard deviations on each side.
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
  const centred = $("centred").checked, byLayer = matches(a.features, b.features, centred);
  $("match").textContent = number(byLayer[state.layer - 1]);
  $("match-layer").textContent = state.layer;
  $("by-layer").replaceChildren(...byLayer.map((value, k) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", k + 1 === state.layer);
    const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, value: Math.max(0, value), ariaHidden: "true" });
    button.append(tagged("span", "Layer ", "unseen"), String(k + 1), meter, number(value));
    button.addEventListener("click", () => {
      focused = k; // The list is rebuilt, so the new button gets the focus.
      chooseLayer(k + 1);
    });
    item.append(button);
    return item;
  }));

  if (focused !== null) $("by-layer").children[focused].firstChild.focus();
  focused = null;

  const found = frameSimilarity(a.values, b.values, dim, centred), { values, rows, columns, stride } = found;
  const [low, high] = quantiles(values, 0.01, 0.995);
  const canvas = $("matrix");
  canvas.style.aspectRatio = `${Math.min(3, Math.max(0.75, columns / rows))}`;
  drawMatrix(canvas, rows, columns, (row, column) => (values[row * columns + column] - low) / (high - low || 1), "viridis");
  canvas.setAttribute("aria-label", `Cosine similarity of each frame of clip A with each frame of clip B at layer ${state.layer}, from ${number(low)} to ${number(high)}`);
  drawScale($("matrix-scale"), "viridis");
  $("matrix-low").textContent = number(low);
  $("matrix-high").textContent = number(high);
  $("matrix-about").textContent = `cosine similarity at layer ${state.layer}${stride > 1 ? `, one frame in ${stride}` : ""}`;
  $("matrix-a").textContent = seconds(a.duration);
  $("matrix-b").textContent = seconds(b.duration);
  matrix = found;
}

let matrix = null, cell = [0, 0], focused = null, matched = {};

/** Returns the average similarity of best matches for each layer; at most 150 frames of a clip, so that it takes a fraction of a second. */
function matches(a, b, centred) {
  if (matched.a !== a || matched.b !== b || matched.centred !== centred) {
    const of = (k) => bestMatch(frameSimilarity(a.layer(k + 1), b.layer(k + 1), a.dim, centred, 150));
    matched = { a, b, centred, values: Array.from({ length: a.layers }, (_, k) => of(k)) };
  }
  return matched.values;
}

/** Shows the value of a cell of the matrix, and marks its times in both clips. */
function readMatrix(column, row) {
  cell = [Math.max(0, Math.min(matrix.columns - 1, column)), Math.max(0, Math.min(matrix.rows - 1, row))];
  const [timeA, timeB] = cell.map((index) => index * matrix.stride * FRAME_SHIFT);
  $("matrix-readout").textContent = `A ${seconds(timeA)} · B ${seconds(timeB)}: ${number(matrix.values[cell[1] * matrix.columns + cell[0]])}`;
  clips[0].mark(timeA);
  clips[1].mark(timeB);
}

// ---- Layer, space and model ----

let scheduled = 0;

/** Draws everything before the next repaint of the screen, once for any number of calls. */
function redraw() {
  scheduled ||= requestAnimationFrame(() => {
    scheduled = 0;
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

/** Updates the controls and the pictures for new features. */
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

let switching = null; // The requests of the last change of space or model.

/** Requests the features of all clips again. If one request is refused, nothing changes. */
const reloadClips = attempt(async () => {
  const selected = selection(), files = clips.map((clip) => clip.next ?? clip.file), members = clips.filter((_, i) => files[i]);
  const requests = (switching = Promise.all(clips.flatMap((clip, i) => (files[i] ? clip.load(files[i], selected) : []))));
  try {
    const found = await requests;
    state.shown = selected;
    members.forEach((clip, i) => clip.show(found[i]));
    refresh();
  } catch (error) {
    if (requests === switching) { // Otherwise a later change is running.
      for (const clip of members) clip.request.abort();
      showSelection();
    }
    throw error;
  } finally {
    if (requests === switching) switching = null;
  }
});

function showSelection() {
  for (const [name, value] of Object.entries(state.shown)) if (value) $(name).value = value;
}

function showCommand() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`, { file } = clips.find((clip) => clip.file);
  const address = new URL(`v1/features?${query({ layer: state.layer, ...state.shown, format: "npy" })}`, location.href);
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
  state.shown.model ||= selection().model;
  showSelection();
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
$("sample").addEventListener("click", attempt(async () => {
  await Promise.all(clips.map(async (clip) => {
    const name = `sample-${clip.letter.toLowerCase()}.flac`, response = await fetch(`page/${name}`);
    if (!response.ok) throw new ServiceError(`The sample can't be loaded: the service responded with status ${response.status}.`, "sample", response.status);
    await clip.open(new File([await response.blob()], name, { type: "audio/flac" }));
  }));
}));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("layer").addEventListener("input", () => chooseLayer(Number($("layer").value)));
$("space").addEventListener("change", reloadClips);
$("model").addEventListener("change", reloadClips);
$("centred").addEventListener("change", compare);
$("copy").hidden = !navigator.clipboard; // Pages over plain http have no clipboard.
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

// Files may be dropped anywhere: on a clip to load that clip, elsewhere to load the first empty one.
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

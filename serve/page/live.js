// The features of a recording while it is made, from the service's stream.

import { divergingPalette, drawMatrix } from "./pictures.js";
import { openStream } from "./service.js";

const WINDOW = 2, OVERLAP = 1; // seconds; longer windows are nearer to the features of the whole recording, and later
const FRAME_SHIFT = 0.02; // seconds
const SHOWN = 500; // frames, the last 10 seconds
const MOST_WAITING = 2 ** 20; // bytes that are not sent yet, about 5 seconds

/** A picture of the last seconds of a recording. It ends with the recording or with an error, which it shows; the recording goes on. */
export class LiveView {
  /**
   * @param {HTMLElement} figure
   * @param {object} selected layer, space and model
   */
  constructor(figure, selected) {
    this.figure = figure;
    this.selected = selected;
    this.part = (name) => figure.querySelector(`.${name}`);
    this.frames = []; // Float32Array for each of the last frames.
    this.count = 0;
  }

  /** Starts to send what is recorded. */
  async start(recording) {
    this.figure.hidden = false;
    this.part("live-features").width = this.part("live-features").width; // Clears the canvas.
    this.part("of-live").textContent = `waiting for ${WINDOW} seconds`;
    const socket = (this.socket = openStream({ ...this.selected, rate: recording.context.sampleRate, encoding: "f32le", format: "binary", window: WINDOW, overlap: OVERLAP }));
    const early = [];
    socket.addEventListener("open", () => early.splice(0).forEach((block) => socket.send(block)));
    socket.addEventListener("message", ({ data }) => (typeof data === "string" ? this.read(JSON.parse(data)) : this.add(new Float32Array(data))));
    socket.addEventListener("close", () => this.end("the connection was interrupted."));
    try {
      await recording.tap((block) => {
        if (socket.readyState === WebSocket.CONNECTING) early.push(block);
        else if (socket.bufferedAmount > MOST_WAITING) this.end("the service is too slow.");
        else if (socket.readyState === WebSocket.OPEN) socket.send(block);
      });
    } catch (error) {
      this.end(error.message);
    }
  }

  read(message) {
    if (message.error) this.end(message.error);
    else if (message.dim) [this.dim, this.layer] = [message.dim, message.layer];
  }

  add(values) {
    if (this.ended) return;
    for (let start = 0; start < values.length; start += this.dim) this.frames.push(values.subarray(start, start + this.dim));
    this.count += values.length / this.dim;
    this.frames.splice(0, this.frames.length - SHOWN);
    this.draw();
  }

  draw() {
    const { frames, dim, count } = this, mean = new Float64Array(dim), square = new Float64Array(dim);
    for (const frame of frames) {
      for (let i = 0; i < dim; i++) {
        mean[i] += frame[i] / frames.length;
        square[i] += frame[i] ** 2 / frames.length;
      }
    }
    const scale = mean.map((value, i) => 1 / (6 * Math.sqrt(Math.max(0, square[i] - value ** 2)) || 1)); // Three standard deviations on each side.
    const canvas = this.part("live-features"), name = `Layer ${this.layer} while recording`;
    drawMatrix(canvas, dim, frames.length, (row, column) => 0.5 + (frames[column][row] - mean[row]) * scale[row], divergingPalette(), [0, frames.length / SHOWN]);
    canvas.setAttribute("aria-label", `${name}: ${dim} dimensions in the last ${frames.length} frames`);
    this.part("live-title").textContent = name;
    this.part("live-dim").textContent = dim - 1;
    const first = (count - frames.length) * FRAME_SHIFT;
    this.part("live-from").textContent = `${first.toFixed(1)} s`;
    this.part("live-to").textContent = `${(first + SHOWN * FRAME_SHIFT).toFixed(1)} s`;
    this.part("of-live").textContent = `${count} frames`;
  }

  /** Ends the view because of an error. */
  end(reason) {
    if (this.ended) return;
    this.ended = true;
    this.socket.close();
    this.part("of-live").textContent = `The live view ended: ${reason}`;
  }

  /** Ends the view with the recording. */
  stop() {
    this.ended = true;
    this.socket?.close();
    this.figure.hidden = true;
  }
}

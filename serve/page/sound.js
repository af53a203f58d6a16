// Audio in the browser: decoding for display, recording, and a log-mel spectrogram.

export const SAMPLE_RATE = 16000;
export const BANDS = 80;
const WINDOW = 400, HOP = 160, FFT = 512;

/** Returns the audio of a file at 16 kHz, channels averaged, or null if this browser can't decode it. */
export async function decodeForDisplay(blob) {
  const context = new OfflineAudioContext(1, 1, SAMPLE_RATE);
  let audio;
  try {
    audio = await context.decodeAudioData(await blob.arrayBuffer());
  } catch {
    return null;
  }
  const samples = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel++) {
    audio.getChannelData(channel).forEach((value, i) => { samples[i] += value / audio.numberOfChannels; });
  }
  return samples;
}

/** Returns samples as a 16-bit mono WAV file. */
export function toWav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.max(-32768, Math.min(32767, Math.round(value * 32768))), true));
  return new Blob([view], { type: "audio/wav" });
}

/** A recording in progress. `stop` returns a WAV file, since browsers record in formats that few programs can read. */
export class Recording {
  static async start(onLevel) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("This browser allows recording only on pages over https or on localhost.");
    }
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, autoGainControl: false } });
    } catch (error) {
      const why = { NotAllowedError: "permission was denied", NotFoundError: "none was found" }[error.name] ?? error.message;
      throw new Error(`The microphone can't be used: ${why}.`);
    }
    return new Recording(stream, onLevel);
  }

  constructor(stream, onLevel) {
    this.stream = stream;
    try {
      this.began = performance.now();
      this.recorder = new MediaRecorder(stream);
      this.pieces = [];
      this.recorder.addEventListener("dataavailable", (event) => this.pieces.push(event.data));
      // The recorder also stops if the microphone is unplugged.
      this.ended = new Promise((resolve) => this.recorder.addEventListener("stop", resolve));
      this.recorder.start();
      this.context = new AudioContext();
      const analyser = new AnalyserNode(this.context, { fftSize: 1024 }), wave = new Float32Array(1024);
      this.source = this.context.createMediaStreamSource(stream);
      this.source.connect(analyser);
      this.timer = setInterval(() => {
        analyser.getFloatTimeDomainData(wave);
        const loudness = 20 * Math.log10(Math.hypot(...wave) / 32 + 1e-9);
        onLevel(Math.max(0, Math.min(1, (loudness + 60) / 60)), (performance.now() - this.began) / 1000);
      }, 80);
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /** Calls back with the samples as they are recorded, in blocks of about 0.1 s, at the sampling rate of `context`. */
  async tap(onSamples) {
    await this.context.audioWorklet.addModule("page/tap.js");
    const node = new AudioWorkletNode(this.context, "tap", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    node.port.onmessage = ({ data }) => onSamples(data);
    this.source.connect(node);
  }

  /** Releases the microphone. */
  release() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.context?.close();
  }

  async stop() {
    clearInterval(this.timer);
    try {
      if (this.recorder.state !== "inactive") this.recorder.stop();
      await this.ended;
    } finally {
      this.release();
    }
    const samples = await decodeForDisplay(new Blob(this.pieces, { type: this.recorder.mimeType }));
    if (!samples?.length) throw new Error("Nothing was recorded.");
    const clock = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
    return new File([toWav(samples, SAMPLE_RATE)], `recording-${clock}.wav`, { type: "audio/wav" });
  }
}

function melFilters() {
  const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700), hertz = (mels) => 700 * (10 ** (mels / 2595) - 1);
  const edges = Array.from({ length: BANDS + 2 }, (_, i) => (hertz((i * mel(SAMPLE_RATE / 2)) / (BANDS + 1)) * FFT) / SAMPLE_RATE);
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, middle, high] = edges.slice(band, band + 3), first = Math.floor(low), weights = [];
    for (let bin = first; bin <= Math.min(FFT / 2, Math.ceil(high)); bin++) {
      // The nearest bin always has some weight, since low bands are narrower than one bin.
      const weight = Math.min((bin - low) / (middle - low), (high - bin) / (high - middle));
      weights.push(Math.max(weight, bin === Math.round(middle) ? 0.05 : 0));
    }
    return { first, weights };
  });
}

function fft(real, imaginary) {
  for (let i = 1, j = 0; i < FFT; i++) {
    let bit = FFT >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let size = 2; size <= FFT; size <<= 1) {
    const angle = (-2 * Math.PI) / size;
    for (let k = 0; k < size / 2; k++) {
      const cos = Math.cos(angle * k), sin = Math.sin(angle * k);
      for (let start = 0; start < FFT; start += size) {
        const a = start + k, b = a + size / 2;
        const re = real[b] * cos - imaginary[b] * sin, im = real[b] * sin + imaginary[b] * cos;
        real[b] = real[a] - re;
        imaginary[b] = imaginary[a] - im;
        real[a] += re;
        imaginary[a] += im;
      }
    }
  }
}

/** Returns log-mel power in dB, [BANDS, columns], for windows of 25 ms every 10 ms. */
export function logMel(samples) {
  const columns = Math.max(1, Math.floor((samples.length - WINDOW) / HOP) + 1), values = new Float32Array(BANDS * columns);
  const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  const filters = melFilters(), real = new Float64Array(FFT), imaginary = new Float64Array(FFT);
  for (let column = 0; column < columns; column++) {
    real.fill(0);
    imaginary.fill(0);
    const window = samples.subarray(column * HOP, column * HOP + WINDOW), mean = window.reduce((sum, value) => sum + value, 0) / window.length;
    window.forEach((value, i) => { real[i] = (value - mean) * hann[i]; });
    fft(real, imaginary);
    filters.forEach(({ first, weights }, band) => {
      let power = 1e-10;
      weights.forEach((weight, i) => { power += weight * (real[first + i] ** 2 + imaginary[first + i] ** 2); });
      values[band * columns + column] = 10 * Math.log10(power);
    });
  }
  return { values, columns };
}

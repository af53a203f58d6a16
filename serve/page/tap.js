// Audio worklet that passes on the samples of its input in blocks of about 0.1 seconds.

class Tap extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(4096);
    this.filled = 0;
  }

  process([[samples]]) {
    if (!samples) return true; // The microphone has not started yet.
    this.block.set(samples, this.filled); // 128 samples at a time, of which the block holds a whole number.
    this.filled += samples.length;
    if (this.filled === this.block.length) {
      this.port.postMessage(this.block.slice());
      this.filled = 0;
    }
    return true;
  }
}

registerProcessor("tap", Tap);

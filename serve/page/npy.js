// Reader for NumPy's .npy format, versions 1 to 3, with float16 arrays in C order, as the page requests them.

/** The float32 value of each float16 bit pattern. */
const HALF = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  HALF[bits] = exponent === 31 ? (fraction ? NaN : sign * Infinity)
    : exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

/** Features of all layers of one clip, [layers, frames, dim], stored as float16. */
export class Features {
  /** @param {ArrayBuffer} buffer contents of an .npy file */
  constructor(buffer) {
    const bytes = new Uint8Array(buffer), view = new DataView(buffer);
    if (bytes[0] !== 0x93 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") throw new Error("The response is not an npy file.");
    const wide = bytes[6] > 1, length = wide ? view.getUint32(8, true) : view.getUint16(8, true), start = (wide ? 12 : 10) + length;
    const header = new TextDecoder().decode(bytes.subarray(wide ? 12 : 10, start));
    const shape = (/'shape':\s*\(([^)]*)\)/.exec(header)?.[1] ?? "").split(",").filter((n) => n.trim()).map(Number);
    if (!/'descr':\s*'<f2'/.test(header) || /'fortran_order':\s*True/.test(header) || shape.length !== 3) {
      throw new Error(`The response must be float16 with shape [layers, frames, dim], but it is ${header.trim()}.`);
    }
    [this.layers, this.frames, this.dim] = shape;
    this.values = new Uint16Array(buffer.slice(start, start + 2 * this.layers * this.frames * this.dim));
  }

  /**
   * Returns one layer, [frames, dim].
   * @param {number} number counted from 1
   */
  layer(number) {
    const size = this.frames * this.dim, values = new Float32Array(size), first = (number - 1) * size;
    for (let i = 0; i < size; i++) values[i] = HALF[this.values[first + i]];
    return values;
  }
}

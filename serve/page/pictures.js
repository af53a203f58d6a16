// Drawing on canvases. Times are fractions of the clip's duration, so that all pictures of a clip are aligned.

const PALETTES = {
  // Nine points of matplotlib's magma and viridis.
  magma: ["000004", "1c1044", "4f127b", "812581", "b5367a", "e55064", "fb8761", "fec287", "fcfdbf"],
  viridis: ["440154", "472c7a", "3b518b", "2c718e", "21908d", "27ad81", "5cc863", "aadc32", "fde725"],
  // Blue for low and red for high values; the middle is the background of the page, light or dark.
  diverging: ["08306b", "2171b5", "9ecae1", "f7f7f7", "fcae91", "cb181d", "67000d"],
  divergingDark: ["a6dcff", "4aa3df", "1f5078", "14181f", "7a3a22", "e0703c", "ffd2ae"],
};
const tables = {};

/** Returns 256 colours in the layout of ImageData. */
function table(name) {
  return (tables[name] ??= Uint32Array.from({ length: 256 }, (_, i) => {
    const points = PALETTES[name], at = (i / 255) * (points.length - 1), low = Math.min(Math.floor(at), points.length - 2);
    const [a, b] = [points[low], points[low + 1]].map((hex) => [0, 2, 4].map((n) => parseInt(hex.slice(n, n + 2), 16)));
    const [r, g, b_] = a.map((value, n) => Math.round(value + (b[n] - value) * (at - low)));
    return (255 << 24) | (b_ << 16) | (g << 8) | r;
  }));
}

export const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
export const divergingPalette = () => (isDark() ? "divergingDark" : "diverging");

/** Resizes the canvas to its size on the screen, clears it, and returns its context. */
function prepare(canvas) {
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
  return canvas.getContext("2d");
}

/**
 * Draws a matrix as an image.
 * @param {(row: number, column: number) => number} value in [0, 1], from the first to the last colour; row 0 is at the top
 * @param {[number, number]} span start and end of the columns, as fractions of the width of the canvas
 */
export function drawMatrix(canvas, rows, columns, value, palette, span = [0, 1]) {
  const context = prepare(canvas), colours = table(palette);
  const image = new ImageData(columns, rows), pixels = new Uint32Array(image.data.buffer);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      pixels[row * columns + column] = colours[Math.max(0, Math.min(255, Math.round(255 * value(row, column)))) || 0];
    }
  }
  const source = new OffscreenCanvas(columns, rows);
  source.getContext("2d").putImageData(image, 0, 0);
  const left = span[0] * canvas.width, width = (span[1] - span[0]) * canvas.width;
  // Cells larger than pixels are drawn sharply, smaller ones are averaged.
  context.imageSmoothingEnabled = columns > width || rows > canvas.height;
  context.imageSmoothingQuality = "high";
  context.drawImage(source, left, 0, width, canvas.height);
  return context;
}

/**
 * Draws a waveform.
 * @param {number} peak value at the top; its negative is at the bottom
 */
export function drawWaveform(canvas, samples, peak) {
  const context = prepare(canvas), { width, height } = canvas;
  context.fillStyle = getComputedStyle(canvas).color;
  for (let x = 0; x < width; x++) {
    let low = peak, high = -peak;
    const end = Math.ceil(((x + 1) * samples.length) / width);
    for (let i = Math.floor((x * samples.length) / width); i < end; i++) {
      low = Math.min(low, samples[i]);
      high = Math.max(high, samples[i]);
    }
    const top = ((peak - high) / (2 * peak)) * height;
    context.fillRect(x, top, 1, Math.max(devicePixelRatio, ((high - low) / (2 * peak)) * height));
  }
}

/** Outlines one row of a matrix. */
export function outlineRow(context, row, rows) {
  const { width, height } = context.canvas, line = 2 * devicePixelRatio;
  context.strokeStyle = "#fff";
  context.lineWidth = line;
  context.strokeRect(line / 2, (row * height) / rows + line / 2, width - line, height / rows - line);
}

/** Draws all colours of a palette, from the first to the last. */
export function drawScale(canvas, palette) {
  drawMatrix(canvas, 1, 256, (_, column) => column / 255, palette);
}

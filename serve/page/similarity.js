// Cosine similarities of frames and of clips.

/** Returns every `stride`-th row of [frames, dim], minus `mean` if given, scaled to unit length. */
function unitRows(values, dim, stride, mean) {
  const rows = Math.ceil(values.length / dim / stride), unit = new Float32Array(rows * dim);
  for (let row = 0; row < rows; row++) {
    let square = 0;
    for (let d = 0; d < dim; d++) {
      const value = values[row * stride * dim + d] - (mean ? mean[d] : 0);
      unit[row * dim + d] = value;
      square += value * value;
    }
    const scale = square ? 1 / Math.sqrt(square) : 0;
    for (let d = 0; d < dim; d++) unit[row * dim + d] *= scale;
  }
  return unit;
}

/** Returns the mean of [frames, dim] over frames. */
export function meanVector(values, dim) {
  const mean = new Float64Array(dim), frames = values.length / dim;
  for (let i = 0; i < values.length; i++) mean[i % dim] += values[i] / frames;
  return mean;
}

/** Returns 1 minus the cosine similarity of each frame with the previous one; 0 for the first frame. */
export function changes(values, dim) {
  const unit = unitRows(values, dim, 1), frames = values.length / dim, found = new Float32Array(frames);
  for (let t = 1; t < frames; t++) {
    let dot = 0;
    for (let d = 0; d < dim; d++) dot += unit[t * dim + d] * unit[(t - 1) * dim + d];
    found[t] = 1 - dot;
  }
  return found;
}

/**
 * Returns the cosine similarity of each frame of B (rows) with each frame of A (columns), with at most `most` rows and columns.
 * @param {boolean} centred whether the mean of all frames of both clips is subtracted first
 */
export function frameSimilarity(a, b, dim, centred, most = 600) {
  const framesA = a.length / dim, framesB = b.length / dim;
  const stride = Math.max(1, Math.ceil(Math.max(framesA, framesB) / most));
  let mean = null;
  if (centred) {
    const meanA = meanVector(a, dim), meanB = meanVector(b, dim);
    mean = meanA.map((value, d) => (value * framesA + meanB[d] * framesB) / (framesA + framesB));
  }
  const unitA = unitRows(a, dim, stride, mean), unitB = unitRows(b, dim, stride, mean);
  const columns = unitA.length / dim, rows = unitB.length / dim, values = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      let dot = 0;
      for (let d = 0, i = row * dim, j = column * dim; d < dim; d++, i++, j++) dot += unitB[i] * unitA[j];
      values[row * columns + column] = dot;
    }
  }
  return { values, rows, columns, stride };
}

/** Returns the highest similarity of each frame with any frame of the other clip, averaged over the frames of each clip and both clips. */
export function bestMatch({ values, rows, columns }) {
  const bestOfRow = new Float32Array(rows).fill(-1), bestOfColumn = new Float32Array(columns).fill(-1);
  values.forEach((value, i) => {
    const row = Math.floor(i / columns), column = i % columns;
    bestOfRow[row] = Math.max(bestOfRow[row], value);
    bestOfColumn[column] = Math.max(bestOfColumn[column], value);
  });
  const average = (best) => best.reduce((sum, value) => sum + value, 0) / best.length;
  return (average(bestOfRow) + average(bestOfColumn)) / 2;
}

/** Returns the quantiles `low` and `high` of the finite values. */
export function quantiles(values, low, high) {
  const sorted = Float32Array.from(values).filter(Number.isFinite).sort();
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))] ?? 0;
  return [at(low), at(high)];
}

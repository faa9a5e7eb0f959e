// PIL's bicubic resize, bit for bit: the transform that the model was trained with. A canvas resizes without looking at
// most pixels of a photo, and the embedding shows it (docs/export.md has the figures).
//
// PIL rounds and clips to 8 bits between its two passes and has weights of 22 fractional bits; the columns come first.

const ONE = 2 ** 22;

function cubic(x) { // Keys' kernel with a = -0.5
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

/** For each of `to` places: the first of the `from` places that it is made of, and their weights. */
function weights(from, to) {
  const stretch = Math.max(from / to, 1); // the filter widens when the picture shrinks
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * (from / to);
    const first = Math.max(Math.trunc(centre - 2 * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(centre + 2 * stretch + 0.5), from);
    const values = Array.from({ length: last - first }, (_, i) => cubic((first + i - centre + 0.5) / stretch));
    const sum = values.reduce((total, value) => total + value, 0);
    return { first, values: values.map((value) => Math.trunc((value / sum) * ONE + 0.5 * Math.sign(value))) };
  });
}

/** One pass: `lines` lines of `from` pixels become lines of `to` pixels; the line is what comes out as a column. */
function pass(source, from, to, lines) {
  const target = new Uint8ClampedArray(to * lines * 3);
  weights(from, to).forEach(({ first, values }, place) => {
    for (let line = 0; line < lines; line += 1) {
      for (let colour = 0; colour < 3; colour += 1) {
        let sum = ONE / 2;
        let at = (line * from + first) * 3 + colour;
        for (const value of values) {
          sum += source[at] * value;
          at += 3;
        }
        target[(place * lines + line) * 3 + colour] = Math.floor(sum / ONE); // the array's type clips
      }
    }
  });
  return target;
}

/** RGB bytes, row by row, of width x height pixels -> the same of newWidth x newHeight (Uint8ClampedArray). */
export function resize(rgb, width, height, newWidth, newHeight) {
  // Each pass exchanges rows and columns, so the second one is like the first. Equal sizes have weights of 0 and 1.
  return pass(pass(rgb, width, newWidth, height), height, newHeight, newWidth);
}

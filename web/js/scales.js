/** The arithmetic of the loss chart. */

/** The axis of losses is at least so much of the largest high: three figures tell its ticks apart. */
const LEAST = 0.02;

/** Round numbers from `low` to `high`, about `count` steps apart. */
export function ticksOf(low, high, count) {
  const rough = (high - low) / count;
  // Between numbers too close to count from one to the other there is nothing to tell apart.
  if (!(rough > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
    ticks.push(n * step);
  }
  return ticks;
}

/** A number in as few characters as tell it. */
export function numberText(value) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e6) return value.toExponential(1).replace("+", "");
  if (Math.abs(value) >= 1000) return `${Number((value / 1000).toPrecision(3))}k`;
  if (Math.abs(value) < 0.001) return value.toExponential(1);
  return `${Number(value.toPrecision(3))}`;
}

/** The right end of the axis of steps: all of them, or half, a quarter … while few are done. */
export function reach(steps, step) {
  let end = Math.max(1, steps);
  while (end > 20 && end / 2 >= step * 1.02) end /= 2;
  return Math.ceil(end);
}

/** Running means of `[step, loss]` by a Gaussian window of 4 % of the steps, 2 points at least. */
export function smoothed(points) {
  const count = points.length;
  if (count < 3) return points.slice();
  const span = points[count - 1][0] - points[0][0];
  const width = Math.max(0.04 * span, (2 * span) / (count - 1));
  if (!(width > 0)) return points.slice();
  let first = 0;
  return points.map(([step, loss]) => {
    while (points[first][0] < step - 3 * width) first++;
    let weights = 0;
    let sum = 0;
    for (let j = first; j < count && points[j][0] <= step + 3 * width; j++) {
      const weight = Math.exp(-0.5 * ((points[j][0] - step) / width) ** 2);
      weights += weight;
      sum += weight * points[j][1];
    }
    return [step, weights ? sum / weights : loss];
  });
}

/**
 * The axis of losses: `place(loss)` is 0 at the bottom and 1 at the top.
 *
 * Lines fit in whole, of the raw losses all but the wildest twentieth. Logarithmic where the
 * experts' losses are of different sizes: they usually are, since each has its own noise.
 */
export function verticalAxis(points, lines) {
  const values = (all) => all.flat().map((p) => p[1]).filter(Number.isFinite);
  const raw = values(points).sort((a, b) => a - b);
  if (!raw.length) return { ticks: [0, 0.5, 1], place: (v) => v };
  const quantile = (q) => raw[Math.round(q * (raw.length - 1))];
  const shown = [...values(lines), quantile(0.025), quantile(0.975)];
  let low = shown.reduce((a, b) => Math.min(a, b));
  let high = shown.reduce((a, b) => Math.max(a, b));
  if (low > 0 && high / low > 6) {
    const bottom = Math.log10(low) - 0.05;
    const range = Math.log10(high) + 0.05 - bottom;
    const ticks = [];
    const parts = range > 2.6 ? [1] : range > 1.2 ? [1, 3] : [1, 2, 5];
    // A training that diverges covers many powers of ten: labels for about six of them.
    const every = Math.max(1, Math.ceil(range / 6));
    for (let power = Math.floor(bottom); power <= bottom + range; power += every) {
      for (const part of parts) ticks.push(part * 10 ** power);
    }
    const place = (v) => (Math.log10(Math.max(v, 1e-30)) - bottom) / range;
    return { ticks: ticks.filter((t) => place(t) >= 0 && place(t) <= 1), place };
  }
  // Losses that are all the same, but for the last digits of their means, lie in the middle.
  const least = LEAST * Math.max(Math.abs(low), Math.abs(high)) || 1;
  const margin = Math.max(0.06 * (high - low), (least - (high - low)) / 2);
  low -= margin;
  high += margin;
  return { ticks: ticksOf(low, high, 3), place: (v) => (v - low) / (high - low) };
}

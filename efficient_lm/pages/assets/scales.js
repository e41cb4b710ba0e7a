// From values to places on the screen, and to text.

const UNITS = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function figure(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e21 || (size > 0 && size < 0.001)) return value.toExponential(digits - 1).replace(/\.?0*e\+?/, "e");
  const [factor, letter] = UNITS.find(([least]) => size >= least * 0.99995) || [1, ""];
  return Number((value / factor).toPrecision(digits)) + (letter && "\u202f" + letter);
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(part => part * power).find(size => size >= rough * 0.999) || rough;
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: Math.max(last - first + 1, 0)}, (_, place) => Number(((first + place) * step).toPrecision(12)));
}

function logTicks(low, high, count) {
  for (const parts of [[1], [1, 3], [1, 2, 5]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const part of parts) ticks.push(Number(`${part}e${power}`));
    const inside = ticks.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
    if (inside.length >= 3) return inside.filter((_, place) => place % Math.ceil(inside.length / (count + 2)) === 0);
  }
  return linearTicks(low, high, count);
}

// An axis over [low, high]: where a value goes, and ticks.
function axis(low, high, from, to, log, count) {
  if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const bend = log ? Math.log : value => value;
  const start = bend(low), span = bend(high) - start, room = 0.03;
  const at = value => from + ((bend(value) - start) / span * (1 - 2 * room) + room) * (to - from);
  return {at, ticks: (log ? logTicks : linearTicks)(low, high, count)};
}

// Points that no other beats, from the least cost on; `more` says that more is better.
function front(points, more) {
  const sign = more ? -1 : 1;
  let best = Infinity;
  return [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y))
    .filter(point => sign * point.y < best && ((best = sign * point.y), true));
}

// Widths on a line where every doubling takes the same room: each up to 8, then eight to the octave.

export function stopsOf(full, trained, only) {
  if (only) return [...only];
  const stops = new Set([full, ...trained]);
  for (let low = 1; low <= full; low *= 2)
    for (let n = 0; n < 8; n++) {
      const width = low + (low * n) / 8;
      if (Number.isInteger(width) && width <= full) stops.add(width);
    }
  return [...stops].sort((a, b) => a - b);
}

// Where a width lies, in stops; 0 is before the first dimension.
export function place(stops, width) {
  const n = stops.findIndex((stop) => stop >= width);
  if (n < 0) return stops.length;
  const before = n ? stops[n - 1] : 0;
  return n + (width - before) / (stops[n] - before);
}

// The vector as bars, above the line where positive; what the width leaves out is faint.
export function drawVector(canvas, stops, width, numbers) {
  const ratio = devicePixelRatio || 1;
  const [w, h] = [canvas.clientWidth, canvas.clientHeight];
  if (!w) return;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const brush = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const [inside, outside] = [style.getPropertyValue("--inside"), style.getPropertyValue("--outside")];
  brush.setTransform(ratio, 0, 0, ratio, 0, 0);
  brush.clearRect(0, 0, w, h);
  const [unit, middle] = [w / stops.length, h / 2];
  const full = stops.at(-1);
  const most = numbers ? Math.sqrt(numbers.reduce((top, x) => Math.max(top, Math.abs(x)), 1e-9)) : 1;
  let from = 0;
  for (let d = 1; d <= full; d++) {
    const to = place(stops, d) * unit;
    const x = numbers ? numbers[d - 1] : 0;
    const tall = numbers ? (Math.sqrt(Math.abs(x)) / most) * (middle - 2) : 0;
    brush.fillStyle = d <= width ? inside : outside;
    const gap = to - from > 3 ? 1 : 0;
    brush.fillRect(from, x > 0 ? middle - tall : middle, Math.max(to - from - gap, 0.5), Math.max(tall, 1));
    from = to;
  }
}

// Labels under the line; where they would touch, the wider width wins.
export function labelled(stops, widths, room) {
  const kept = [];
  for (const width of [...widths].sort((a, b) => b - a)) {
    const at = place(stops, width) / stops.length;
    if (kept.every((other) => (other.at - at) * room > 30)) kept.push({ width, at });
  }
  return kept;
}

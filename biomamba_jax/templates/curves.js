// Draws line charts from the JSON of the element "curves" as SVG; all of them zoom together, over the same steps.
"use strict";
{
const {names, charts} = JSON.parse(document.getElementById("curves").textContent);
const COLORS = ["#2f7ed8", "#e0702d", "#2a9d6f", "#b05cc8", "#c9a227", "#d1495b"];  // as in plots.mplstyle
const WIDTH = 600, HEIGHT = 320, LEFT = 64, RIGHT = 24, TOP = 8, BOTTOM = 40;
const hidden = new Set();
let zoomed = null;  // [first, last] step, or null for all

function add(parent, tag, attributes, text = "") {
  const html = ["figure", "figcaption", "button", "small"].includes(tag);
  const element = html ? document.createElement(tag) : document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return parent.appendChild(element);
}

function shown(value) {
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : Number(value.toPrecision(5)).toLocaleString("en");
}

// Round values between two, some five of them; on a logarithmic axis 1, 2 and 5 times powers of ten where they suffice.
function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    const inside = found.filter(value => value >= low && value <= high);
    if (inside.length > 1) return inside.filter((_, i) => i % Math.ceil(inside.length / 6) === 0);
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(digit => digit * power).find(value => value >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

// Maps [low, high] to [from, to].
function scale(low, high, from, to, log) {
  const map = log ? Math.log : value => value;
  return value => from + (map(value) - map(low)) / (map(high) - map(low)) * (to - from);
}

function range(values, log) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low < high) return [low, high];
  return log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
}

function draw(svg, chart) {
  svg.replaceChildren();
  const visible = chart.series.filter(series => !hidden.has(series.run) && series.x.length);
  const [first, last] = zoomed ?? range(visible.flatMap(series => range(series.x)));
  const points = visible.map(({run, x, y}) => ({run, at: x.map((step, i) => [step, y[i]])}));
  const inside = points.flatMap(({at}) => at.filter(([step]) => step >= first && step <= last).map(([, value]) => value));
  if (!inside.length) return add(svg, "text", {x: LEFT, y: HEIGHT / 2}, "no values here");
  const log = chart.log && inside.every(value => value > 0);
  const [low, high] = range(inside, log);
  const x = scale(first, last, LEFT, WIDTH - RIGHT), y = scale(low, high, HEIGHT - BOTTOM, TOP, log);
  for (const value of ticks(first, last)) {
    add(svg, "line", {class: "grid", x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM});
    add(svg, "text", {x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle"}, shown(value));
  }
  for (const value of ticks(low, high, log)) {
    add(svg, "line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)});
    add(svg, "text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, shown(value));
  }
  add(svg, "text", {x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle"}, "step");
  const area = add(svg, "svg", {x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM});
  area.setAttribute("viewBox", `${LEFT} ${TOP} ${WIDTH - LEFT - RIGHT} ${HEIGHT - TOP - BOTTOM}`);
  for (const {run, at} of points) {
    const number = names.indexOf(run), color = COLORS[number % COLORS.length];
    const ends = at.map(([step, value]) => `${x(step).toFixed(1)},${(log && value <= 0 ? HEIGHT : y(value)).toFixed(1)}`);
    const line = add(area, "polyline", {points: ends.join(" "), stroke: color, fill: "none", "stroke-width": 1.5});
    if (number >= COLORS.length) line.setAttribute("stroke-dasharray", `${2 + 2 * Math.floor(number / COLORS.length)} 3`);
    if (at.length <= 50) for (const end of ends) {
      const [cx, cy] = end.split(",");
      add(area, "circle", {cx, cy, r: 2, fill: color});
    }
  }
  svg.pointed = position => {  // the values nearest to a horizontal position
    const step = first + (position - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    return points.map(({run, at}) => {
      const [nearest, value] = at.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      return `${run}, step ${nearest.toLocaleString("en")}: ${shown(value)}`;
    }).join("\n");
  };
  svg.step = position => first + (position - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
}

const drawn = [];
const redraw = () => drawn.forEach(([svg, chart]) => draw(svg, chart));
for (const chart of charts) {
  const figure = add(document.getElementById("charts"), "figure", {});
  add(figure, "figcaption", {}, chart.title);
  const svg = add(figure, "svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curves"});
  const readout = add(figure, "small", {});
  drawn.push([svg, chart]);
  const position = event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * WIDTH;
    return Math.min(Math.max(at, LEFT), WIDTH - RIGHT);
  };
  let start = null, band = null;
  svg.addEventListener("pointerdown", event => {
    start = position(event);
    band = add(svg, "rect", {class: "band", y: TOP, height: HEIGHT - TOP - BOTTOM});
    svg.setPointerCapture?.(event.pointerId);
  });
  svg.addEventListener("pointermove", event => {
    const here = position(event);
    if (start === null) readout.textContent = svg.pointed?.(here) ?? "";
    else for (const [name, value] of [["x", Math.min(start, here)], ["width", Math.abs(here - start)]]) band.setAttribute(name, value);
  });
  svg.addEventListener("pointerup", event => {
    const [from, to] = [start, position(event)].sort((a, b) => a - b);
    start = null;
    band.remove();
    if (to - from > 5 && svg.step) zoomed = [svg.step(from), svg.step(to)];
    redraw();
  });
  svg.addEventListener("dblclick", () => { zoomed = null; redraw(); });
}
names.forEach((name, number) => {
  const button = add(document.getElementById("runs"), "button", {type: "button", "aria-pressed": "true"}, name);
  button.style.borderColor = COLORS[number % COLORS.length];
  button.addEventListener("click", () => {
    if (!hidden.delete(name)) hidden.add(name);
    button.setAttribute("aria-pressed", String(!hidden.has(name)));
    redraw();
  });
});
redraw();
}

"use strict";
// What every chart uses: the data, colours by name, and drawing at the width that there is.
const DATA = JSON.parse(document.getElementById("data").textContent);
const CHARTS = {};
const COLOURS = { web: "var(--web)", synthetic: "var(--synthetic)", human: "var(--human)" };
const VERDICTS = { kept: "var(--kept)", dropped: "var(--dropped)", failed: "var(--failed)" };
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function colourOf(origin) {
  return COLOURS[origin] || "var(--other)";
}

function percent(part, all) {
  return all ? `${(100 * part / all).toFixed(1)}%` : "–";
}

function words(name) {
  return name.replaceAll("_", " ");
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Of [name, kind of origin] or [name, colour, opacity].
function legend(entries) {
  const list = element("ul", undefined, "legend");
  list.setAttribute("aria-hidden", "true");
  for (const [name, kind, opacity] of entries) {
    const item = element("li");
    const mark = element("span", name, `origin ${opacity === undefined ? kind : "shade"}`);
    if (opacity !== undefined) mark.style.setProperty("--shade", `color-mix(in srgb, ${kind} ${100 * opacity}%, var(--paper))`);
    item.append(mark);
    list.append(item);
  }
  return list;
}

function plot(options) {
  const made = Plot.plot({ style: undefined, marginTop: 14, ...options });
  // The page's own style sheet does what these do, and the policy would refuse them.
  for (const style of made.querySelectorAll("style")) style.remove();
  made.removeAttribute("style");
  made.setAttribute("aria-hidden", "true"); // the place it is put has the label
  return made;
}

function draw(place) {
  const chart = CHARTS[place.dataset.chart.replace(/-\d+/g, "")];
  const numbers = (place.dataset.chart.match(/\d+/g) || []).map(Number);
  const width = Math.floor(place.clientWidth);
  if (!chart || width < 40) return;
  const made = chart(width, ...numbers);
  if (made === null) {
    place.replaceChildren(element("p", "Nothing to draw yet.", "none"));
    return;
  }
  place.replaceChildren(...[made].flat());
}

function redraw(name) {
  for (const place of document.querySelectorAll(`[data-chart^="${name}"]`)) draw(place);
}

// Curves of counts as shares, so that few and many captions can be compared.
function histogram(width, series, { unit, label, height = 170, x = {}, y = {} }) {
  const points = [];
  let most = 0;
  for (const { name, bins } of series) {
    const all = d3.sum(bins, (bin) => bin[1]);
    for (const [position, count] of bins) {
      const share = count / all;
      most = Math.max(most, share);
      points.push({ name, count, share, from: position * unit, to: (position + 1) * unit });
    }
  }
  if (!points.length) return null;
  const drawn = plot({
    width, height, marginLeft: 38, marginBottom: 32,
    x: { label, ...x },
    y: { label: null, tickFormat: "%", ticks: 4, grid: true, domain: [0, most || 1], ...y },
    marks: [
      ...series.map(({ name }) => Plot.rectY(points.filter((p) => p.name === name), {
        x1: "from", x2: "to", y: "share", fill: colourOf(name),
        fillOpacity: series.length > 1 ? 0.2 : 0.7, insetLeft: 0.3, insetRight: 0.3,
      })),
      ...series.map(({ name }) => Plot.lineY(outline(points.filter((p) => p.name === name)), {
        x: "at", y: "share", stroke: colourOf(name), strokeWidth: 1.3,
      })),
      Plot.tip(points, Plot.pointerX({
        x: (p) => (p.from + p.to) / 2, y: "share", fill: "var(--paper)", stroke: "var(--strong-line)",
        title: (p) => `${p.name}: ${+p.from.toFixed(4)} to ${+p.to.toFixed(4)}\n${whole.format(p.count)} (${(100 * p.share).toFixed(1)}%)`,
      })),
      Plot.ruleY([0], { stroke: "var(--strong-line)" }),
    ],
  });
  return series.length > 1 ? [legend(series.map((s) => [s.name, s.name])), drawn] : drawn;
}

function outline(points) {
  const line = [];
  let last = null;
  for (const p of d3.sort(points, (q) => q.from)) {
    if (last !== null && p.from - last > 1e-9) line.push({ at: last, share: 0 }, { at: p.from, share: 0 });
    if (last === null) line.push({ at: p.from, share: 0 });
    line.push({ at: p.from, share: p.share }, { at: p.to, share: p.share });
    last = p.to;
  }
  if (last !== null) line.push({ at: last, share: 0 });
  return line;
}

"use strict";
// One function for each chart of the page: width in, picture out, null where there is nothing.
CHARTS.funnel = function (width) {
  const total = DATA.funnel.total;
  const stages = [["rows in", total.raw.rows], ["images had", total.raw.kept]];
  if (DATA.stages.captions.shards) stages.push(["images scored", total.images_scored]);
  if (DATA.stages.clean.shards) stages.push(["samples kept", total.clean.kept]);
  if (!total.raw.rows) return null;
  const sources = DATA.funnel.sources;
  const bySize = d3.sort(sources, (s) => -s.raw.rows).slice(0, 7).map((s) => s.source);
  const value = { "rows in": (s) => s.raw.rows, "images had": (s) => s.raw.kept, "images scored": (s) => s.images_scored, "samples kept": (s) => s.clean.kept };
  const bars = [];
  for (const [stage] of stages) {
    let others = 0;
    for (const s of sources) {
      if (bySize.includes(s.source)) bars.push({ stage, source: s.source, n: value[stage](s) });
      else others += value[stage](s);
    }
    if (others) bars.push({ stage, source: "(other sources)", n: others });
  }
  const names = [...bySize, ...(sources.length > bySize.length ? ["(other sources)"] : [])];
  const shade = (name) => {
    const i = names.indexOf(name);
    return 1 - 0.72 * (names.length > 1 ? i / (names.length - 1) : 0);
  };
  const drawn = plot({
    width, height: 34 + 44 * stages.length, marginLeft: 92, marginRight: width < 500 ? 92 : 130, marginTop: 4,
    x: { label: null, ticks: width < 500 ? 3 : 6, tickFormat: (n) => short.format(n), grid: true },
    y: { label: null, domain: stages.map((s) => s[0]), tickSize: 0, padding: 0.28 },
    marks: [
      Plot.barX(bars, Plot.stackX({ order: names, z: "source", x: "n", y: "stage", fill: "var(--kept)", fillOpacity: (b) => shade(b.source), insetRight: 1 })),
      Plot.text(stages, { x: (s) => s[1], y: (s) => s[0], text: (s) => `${whole.format(s[1])}  ${percent(s[1], total.raw.rows)}`, textAnchor: "start", dx: 6, fill: "var(--ink)", fontWeight: 600, fontSize: width < 500 ? 10 : 12 }),
      Plot.tip(bars, Plot.pointer(Plot.stackX({ order: names, z: "source", x: "n", y: "stage", fill: "var(--paper)", stroke: "var(--strong-line)", title: (b) => `${b.source}\n${b.stage}: ${whole.format(b.n)}` }))),
    ],
  });
  return names.length > 1 ? [legend(names.map((name) => [name, "var(--kept)", shade(name)])), drawn] : drawn;
};

CHARTS.causes = function (width) {
  const raw = DATA.funnel.total.raw;
  const causes = [];
  for (const verdict of ["dropped", "failed"]) {
    for (const [reason, n] of Object.entries(raw[verdict])) causes.push({ verdict, reason: words(reason), n });
  }
  if (!causes.length) return null;
  const shown = d3.sort(causes, (c) => -c.n).slice(0, 12);
  const drawn = plot({
    width, height: 26 + 24 * shown.length, marginLeft: Math.min(150, width * 0.4), marginRight: 56, marginTop: 2, marginBottom: 18,
    x: { axis: null }, y: { label: null, tickSize: 0, domain: shown.map((c) => c.reason), padding: 0.25 },
    marks: [
      Plot.barX(shown, { x: "n", y: "reason", fill: (c) => VERDICTS[c.verdict] }),
      Plot.text(shown, { x: "n", y: "reason", text: (c) => whole.format(c.n), textAnchor: "start", dx: 5, fill: "var(--ink)" }),
    ],
  });
  return drawn;
};

CHARTS.success = function (width) {
  const points = DATA.downloads.over_time.map((t) => ({ ...t, at: new Date(t.time), share: t.rows ? t.kept / t.rows : 0 }));
  if (!points.length) return null;
  return plot({
    width, height: 200, marginLeft: 42,
    x: { type: "utc", label: null, ticks: width < 450 ? 3 : 6 }, y: { domain: [0, 1], tickFormat: "%", label: null, grid: true, ticks: 5 },
    marks: [
      Plot.lineY(points, { x: "at", y: "share", stroke: "var(--kept)", strokeWidth: 1.8 }),
      Plot.dot(points, { x: "at", y: "share", r: points.length > 30 ? 1.6 : 2.8, fill: "var(--kept)" }),
      Plot.tip(points, Plot.pointerX({ x: "at", y: "share", fill: "var(--paper)", stroke: "var(--strong-line)", title: (t) => `until ${t.time.slice(0, 16).replace("T", " ")}\n${whole.format(t.kept)} of ${whole.format(t.rows)} (${percent(t.kept, t.rows)})` })),
    ],
  });
};

function scoreSeries(name) {
  const chosen = document.getElementById("score-source");
  const source = chosen ? chosen.value : "";
  if (!source) return Object.entries(DATA.scores[name].by_origin).map(([origin, s]) => ({ name: origin, bins: s.bins }));
  return DATA.scores[name].by_source.filter((s) => s.source === source).map((s) => ({ name: s.origin, bins: s.bins }));
}
for (const [name, label] of [["itm", "P(match)"], ["itc", "cosine"], ["clip", "cosine"]]) {
  CHARTS[`score-${name}`] = (width) => histogram(width, scoreSeries(name), { unit: DATA.scores.bin_width, label, height: 190, x: name === "itm" ? { domain: [0, 1.02] } : {} });
}

// Long tails are cut where next to nothing is left, and the axis says so.
function lengths(width, field, unit, label) {
  const series = [];
  let end = 0;
  for (const [origin, s] of Object.entries(DATA.texts.by_origin)) {
    const found = s[field];
    if (!found || !found.bins.length) continue;
    end = Math.max(end, Math.min(found.percentiles.p99, 2 * found.percentiles.p95) + 2 * unit);
    series.push({ name: origin, bins: found.bins });
  }
  const isCut = series.some((s) => s.bins.some((b) => b[0] * unit > end));
  const cut = series.map((s) => ({ name: s.name, bins: s.bins.filter((b) => b[0] * unit <= end) }));
  return histogram(width, cut, { unit, label: isCut ? `${label} (the longest are not drawn)` : label });
}
CHARTS["caption-words"] = (width) => lengths(width, "words", 1, "words");
CHARTS["caption-characters"] = (width) => lengths(width, "characters", 5, "characters");

CHARTS.sides = function (width) {
  const { short_side: low, long_side: high } = DATA.images;
  const end = (high.percentiles.p99 || 0) + 128;
  const part = (s) => s.bins.filter((b) => b[0] * 64 <= end);
  const made = histogram(width, [{ name: "web", bins: part(low) }, { name: "synthetic", bins: part(high) }].map((s) => s), { unit: 64, label: "pixels" });
  if (made === null) return null;
  return [legend([["shorter side", "web"], ["longer side", "synthetic"]]), ...[made].flat().slice(-1)];
};

CHARTS.aspect = function (width) {
  const bins = DATA.images.aspect.bins.map(([b, n]) => ({ from: 2 ** (b / 10), to: 2 ** ((b + 1) / 10), n }));
  return bins.length ? bars(width, bins, "width / height", (v) => `${+v.toFixed(2)}`, 2) : null;
};

CHARTS.bytes = function (width) {
  const bins = DATA.images.bytes.bins.map(([b, n]) => ({ from: 2 ** (b / 2), to: 2 ** ((b + 1) / 2), n }));
  return bins.length ? bars(width, bins, "bytes", inBytes, 4) : null;
};

function inBytes(value) {
  const power = Math.min(3, Math.max(0, Math.floor(Math.log2(value) / 10)));
  return `${short.format(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

function bars(width, bins, label, format, base) {
  return plot({
    width, height: 190, marginLeft: 42, marginBottom: 32,
    x: { type: "log", base, label, tickFormat: format, ticks: 5 }, y: { label: null, ticks: 4, tickFormat: (n) => short.format(n), grid: true },
    marks: [
      Plot.rectY(bins, { x1: "from", x2: "to", y: "n", fill: "var(--other)", insetLeft: 0.5, insetRight: 0.5 }),
      Plot.tip(bins, Plot.pointerX({ x: (b) => Math.sqrt(b.from * b.to), y: "n", fill: "var(--paper)", stroke: "var(--strong-line)", title: (b) => `${format(b.from)} to ${format(b.to)}\n${whole.format(b.n)}` })),
      Plot.ruleY([0], { stroke: "var(--strong-line)" }),
    ],
  });
}

CHARTS.throughput = function (width) {
  const colours = { raw: "var(--web)", captions: "var(--synthetic)", clean: "var(--human)" };
  const points = [];
  for (const [stage, t] of Object.entries(DATA.times.stages)) {
    let rows = 0;
    for (const p of t.over_time) points.push({ stage, at: new Date(p.time), rows: (rows += p.rows), share: rows / DATA.stages[stage].rows });
  }
  if (!points.length) return null;
  const there = [...new Set(points.map((p) => p.stage))];
  const kinds = { raw: "web", captions: "synthetic", clean: "human" };
  const drawn = plot({
    width, height: 220, marginLeft: 46,
    x: { type: "utc", label: null, ticks: width < 450 ? 3 : 8 }, y: { label: null, domain: [0, 1], tickFormat: "%", grid: true, ticks: 5 },
    marks: [
      Plot.lineY(points, { x: "at", y: "share", z: "stage", stroke: (p) => colours[p.stage], strokeWidth: 1.8, curve: "step-after" }),
      Plot.dot(points, { x: "at", y: "share", fill: (p) => colours[p.stage], r: points.length > 60 ? 1.4 : 2.4 }),
      Plot.tip(points, Plot.pointer({ x: "at", y: "share", fill: "var(--paper)", stroke: "var(--strong-line)", title: (p) => `${p.stage}\n${whole.format(p.rows)} rows by ${p.at.toISOString().slice(0, 16).replace("T", " ")}` })),
    ],
  });
  return [legend(there.map((s) => [s, kinds[s]])), drawn];
};

CHARTS.curve = function (width, training, number) {
  const points = Object.values(DATA.training[training].curves)[number];
  if (!points.length) return null;
  return plot({
    width, height: 160, marginLeft: 46,
    x: { label: "step", ticks: 4, tickFormat: (n) => short.format(n) }, y: { label: null, ticks: 4, grid: true, zero: false },
    marks: [
      Plot.lineY(points, { x: (p) => p[0], y: (p) => p[1], stroke: "var(--accent)", strokeWidth: 1.6 }),
      points.length < 12 ? Plot.dot(points, { x: (p) => p[0], y: (p) => p[1], fill: "var(--accent)", r: 2.5 }) : null,
      Plot.tip(points, Plot.pointerX({ x: (p) => p[0], y: (p) => p[1], fill: "var(--paper)", stroke: "var(--strong-line)", title: (p) => `step ${whole.format(p[0])}\n${+p[1].toPrecision(5)}` })),
    ],
  });
};

CHARTS.calibration = function (width, number) {
  const points = DATA.calibration.scores[number].points;
  const lines = [];
  for (const p of points) {
    if (p.precision !== null) lines.push({ at: p.threshold, value: p.precision, what: "precision" });
    lines.push({ at: p.threshold, value: p.recall, what: "recall" });
  }
  if (!lines.length) return null;
  const colours = { precision: "var(--synthetic)", recall: "var(--web)" };
  return [legend([["precision", "synthetic"], ["recall", "web"]]), plot({
    width, height: 210, marginLeft: 42, marginBottom: 32,
    x: { label: "threshold" }, y: { domain: [0, 1], tickFormat: "%", label: null, grid: true, ticks: 5 },
    marks: [
      Plot.lineY(lines, { x: "at", y: "value", z: "what", stroke: (l) => colours[l.what], strokeWidth: 1.8 }),
      Plot.tip(lines, Plot.pointer({ x: "at", y: "value", fill: "var(--paper)", stroke: "var(--strong-line)", title: (l) => `${l.what} ${(100 * l.value).toFixed(1)}%\nat ${l.at.toFixed(3)}` })),
    ],
  })];
};

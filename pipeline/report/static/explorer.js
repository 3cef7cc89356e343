"use strict";
// The threshold explorer: counts of captions beyond any pair of thresholds, from the joint histogram.
const explorer = document.getElementById("explorer-form") && (() => {
  const { cells, sources, origins, itm_step: itmStep, clip_step: clipStep } = DATA.explorer;
  const get = (id) => document.getElementById(id);
  const itm = get("t-itm"), clip = get("t-clip"), source = get("t-source");
  const clips = cells.map((c) => c[3]).filter((v) => v !== null);
  const low = d3.min(clips) ?? 0, high = (d3.max(clips) ?? 0) + 1;
  Object.assign(itm, { step: itmStep, min: 0, max: 1, value: 0.5 });
  Object.assign(clip, { step: clipStep, min: low * clipStep, max: high * clipStep, value: low * clipStep });

  const isHuman = (cell) => origins[cell[1]] === "human";
  // Bins are whole numbers, so that no threshold depends on how a decimal is rounded.
  const thresholds = () => ({ itm: Math.round(itm.value / itmStep), clip: Math.round(clip.value / clipStep) });
  const lowest = () => ({ itm: 0, clip: low });
  function passes(cell, t) {
    if (isHuman(cell)) return true;
    const enough = (value, threshold, least) => (value === null ? threshold <= least : value >= threshold);
    return enough(cell[2], t.itm, lowest().itm) && enough(cell[3], t.clip, lowest().clip);
  }
  function chosen() {
    const boxes = [...document.querySelectorAll('#explorer-form input[name="origin"]:checked')];
    const wanted = new Set(boxes.map((box) => Number(box.value)));
    return cells.filter((c) => wanted.has(c[1]) && (source.value === "" || c[0] === Number(source.value)));
  }

  function update() {
    const t = thresholds(), shown = chosen();
    get("o-itm").textContent = (t.itm * itmStep).toFixed(2);
    get("o-clip").textContent = (t.clip * clipStep).toFixed(2);
    const all = d3.sum(shown, (c) => c[4]), kept = d3.sum(shown, (c) => (passes(c, t) ? c[4] : 0));
    const strong = element("strong", percent(kept, all));
    get("t-result").replaceChildren(strong, `${whole.format(kept)} of ${whole.format(all)} captions kept`);
    const rows = origins.map((name, number) => {
      const own = shown.filter((c) => c[1] === number);
      const sum = d3.sum(own, (c) => c[4]), left = d3.sum(own, (c) => (passes(c, t) ? c[4] : 0));
      const row = element("tr"), head = element("th");
      head.scope = "row";
      head.append(element("span", name, `origin ${COLOURS[name] ? name : "other"}`));
      row.append(head, element("td", whole.format(sum), "n"), element("td", whole.format(left), "n"), element("td", percent(left, sum), "n"));
      return row;
    });
    document.querySelector("#t-table tbody").replaceChildren(...rows);
    redraw("explorer");
  }

  CHARTS.explorer = function (width) {
    const t = thresholds(), sums = new Map();
    let isItm = false, isClip = false;
    for (const c of chosen()) {
      if (c[2] === null && c[3] === null) continue;
      isItm ||= c[2] !== null;
      isClip ||= c[3] !== null;
      const key = `${c[2] ?? 0},${c[3] ?? 0}`;
      sums.set(key, (sums.get(key) || 0) + c[4]);
    }
    if (!sums.size) return null;
    const tiles = [...sums].map(([key, n]) => {
      const [x, y] = key.split(",").map(Number);
      return { x: x * itmStep, y: y * clipStep, n };
    });
    const bottom = isClip ? low * clipStep : 0, top = isClip ? high * clipStep : clipStep;
    const height = isClip ? Math.max(260, Math.min(440, Math.round(width * 0.6))) : 160;
    const edge = { x: t.itm * itmStep, y: isClip ? t.clip * clipStep : bottom };
    const picture = plot({
      width, height, marginLeft: 46, marginBottom: 34, marginRight: 12,
      x: { label: isItm ? "ITM" : "ITM (not taken)", domain: [0, 1 + itmStep] },
      y: { label: isClip ? "CLIP" : "CLIP (not taken)", domain: [bottom, top], ticks: isClip ? 6 : 0 },
      color: { type: "log", domain: [1, Math.max(2, d3.max(tiles, (c) => c.n))], range: ["var(--map-low)", "var(--map-high)"], interpolate: mix },
      marks: [
        Plot.rect(tiles, { x1: "x", x2: (c) => c.x + itmStep, y1: "y", y2: (c) => c.y + clipStep, fill: "n", inset: 0.2 }),
        Plot.rect([edge], { x1: "x", x2: 1 + itmStep, y1: "y", y2: top, fill: "none", stroke: "var(--web)", strokeWidth: 2 }),
        Plot.tip(tiles, Plot.pointer({ x: (c) => c.x + itmStep / 2, y: (c) => c.y + clipStep / 2, fill: "var(--paper)", stroke: "var(--strong-line)", maxRadius: 12, title: (c) => `ITM ${c.x.toFixed(2)}, CLIP ${c.y.toFixed(2)}\n${whole.format(c.n)} captions` })),
      ],
    });
    picture.addEventListener("click", (event) => {
      const box = picture.getBoundingClientRect(), scale = width / box.width;
      const x = picture.scale("x").invert((event.clientX - box.left) * scale);
      const y = picture.scale("y").invert((event.clientY - box.top) * scale);
      itm.value = Math.max(0, Math.min(1, x));
      if (isClip) clip.value = Math.max(low * clipStep, Math.min(high * clipStep, y));
      update();
    });
    return picture;
  };
  // A mixture of two of the theme's colours, so that a change of theme needs no new picture.
  function mix(from, to) {
    return (t) => `color-mix(in oklab, ${to} ${(100 * t).toFixed(1)}%, ${from})`;
  }
  document.getElementById("explorer-form").addEventListener("input", update);
  document.getElementById("explorer-form").addEventListener("submit", (event) => event.preventDefault());
  return { update, thresholds, chosen, passes };
})();

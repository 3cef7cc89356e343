"use strict";
// Draws what is in the page, again when its width changes; theme, sections and print.
if (explorer) explorer.update();
const widths = new Map();
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const width = Math.floor(target.clientWidth);
    if (widths.get(target) !== width) {
      widths.set(target, width);
      draw(target);
    }
  }
});
for (const place of document.querySelectorAll("[data-chart]")) observer.observe(place);

const chooser = document.getElementById("score-source");
if (chooser) chooser.addEventListener("input", () => redraw("score-"));

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");
button.addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
  button.textContent = `Theme: ${root.dataset.theme}`;
});

const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting || !links.has(target.id)) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-10% 0px -80% 0px" });
for (const id of links.keys()) {
  const section = document.getElementById(id);
  if (section) inView.observe(section);
}

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")].filter((d) => !d.querySelector("pre"));
  for (const part of closed) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});

"use strict";
// Filters of the gallery; the samples are in the page already, and are shown some at a time.
const galleryForm = document.getElementById("gallery-form");
if (galleryForm) {
  const PAGE = 24;
  let limit = PAGE;
  const more = document.getElementById("g-more");
  const items = [...document.querySelectorAll("#gallery-list > li")].map((item) => ({
    item,
    group: item.dataset.group,
    source: item.dataset.source,
    reasons: JSON.parse(item.dataset.reasons),
    text: item.textContent.toLowerCase(),
  }));
  const filter = () => {
    const wanted = new FormData(galleryForm);
    const parts = wanted.get("text").toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const { item, group, source, reasons, text } of items) {
      const fits =
        (!wanted.get("group") || group === wanted.get("group")) &&
        (!wanted.get("source") || source === wanted.get("source")) &&
        (!wanted.get("reason") || reasons.includes(wanted.get("reason"))) &&
        parts.every((part) => text.includes(part));
      found += fits;
      item.hidden = !fits || found > limit;
    }
    const shown = Math.min(found, limit);
    document.getElementById("g-count").textContent = shown < found ? `${shown} of ${found} shown` : `${shown} shown`;
    more.hidden = shown === found;
  };
  galleryForm.addEventListener("input", () => {
    limit = PAGE;
    filter();
  });
  galleryForm.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = items.filter(({ item }) => !item.hidden).length;
    limit += PAGE;
    filter();
    // What was just revealed gets the focus, for those who do not see it appear.
    const first = items.filter(({ item }) => !item.hidden)[next];
    first.item.tabIndex = -1;
    first.item.focus();
  });
  filter();
}

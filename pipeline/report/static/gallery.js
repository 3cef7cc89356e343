"use strict";
// Filters of the gallery; the samples are in the page already.
const galleryForm = document.getElementById("gallery-form");
if (galleryForm) {
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
    let shown = 0;
    for (const { item, group, source, reasons, text } of items) {
      const fits =
        (!wanted.get("group") || group === wanted.get("group")) &&
        (!wanted.get("source") || source === wanted.get("source")) &&
        (!wanted.get("reason") || reasons.includes(wanted.get("reason"))) &&
        parts.every((part) => text.includes(part));
      item.hidden = !fits;
      shown += fits;
    }
    document.getElementById("g-count").textContent = `${shown} shown`;
  };
  galleryForm.addEventListener("input", filter);
  galleryForm.addEventListener("submit", (event) => event.preventDefault());
}

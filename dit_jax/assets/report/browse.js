// Filters the table of answers. It only reads text and hides rows: nothing that a model wrote becomes markup.
"use strict";
for (const browser of document.querySelectorAll(".browser")) {
  const form = browser.querySelector("form"), more = browser.querySelector("button");
  const count = browser.querySelector("output");
  const rows = Array.from(browser.querySelectorAll("tbody tr"), row => ({
    row, text: row.textContent.toLowerCase(), method: row.dataset.method, result: row.className
  }));
  const step = 30;
  let most = step;
  const show = () => {
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const method = form.elements.method.value, result = form.elements.result.value;
    let found = 0;
    for (const item of rows) {
      const fits = (!method || item.method === method) && (!result || item.result === result) &&
        words.every(word => item.text.includes(word));
      found += fits;
      item.row.hidden = !fits || found > most;
    }
    count.textContent = `${Math.min(found, most)} of ${found} shown`;
    more.hidden = found <= most;
  };
  browser.querySelector("table").addEventListener("sorted", () => {
    rows.sort((a, b) => a.row.compareDocumentPosition(b.row) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);
    show();
  });
  form.addEventListener("input", () => { most = step; show(); });
  form.addEventListener("submit", event => event.preventDefault());
  more.addEventListener("click", () => { most += 5 * step; show(); });
  form.hidden = false;
  browser.open = true;
  show();
}

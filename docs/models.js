// A field above the table of models.md that filters its rows, and the models in a row.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector(".models table");
  if (!table) return;
  const field = Object.assign(document.createElement("input"), {
    type: "search",
    className: "models-filter",
    placeholder: "dinov3 drop …",
  });
  field.setAttribute("aria-label", "Filter the models by words");
  const count = document.createElement("p");
  count.setAttribute("role", "status");
  document.querySelector(".models").prepend(field, count);

  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = [...table.tBodies[0].rows].map((row) => {
    const cells = [...row.cells];
    cells.forEach((cell, i) => (cell.dataset.head = heads[i])); // for a phone's layout
    const models = [...cells.pop().querySelectorAll("code")];
    return { row, models, words: cells.map((cell) => cell.textContent.toLowerCase()) };
  });

  // Each word must be in one of the row's cells or in the model's name.
  const filter = () => {
    const wanted = field.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    let shown = 0;
    for (const { row, models, words } of rows) {
      const left = wanted.filter((word) => !words.some((cell) => cell.includes(word)));
      let here = 0;
      for (const model of models) {
        model.hidden = !left.every((word) => model.textContent.includes(word));
        here += !model.hidden;
      }
      row.hidden = !here;
      shown += here;
    }
    count.textContent = `${shown} models`;
  };
  field.addEventListener("input", filter);
  filter();
});

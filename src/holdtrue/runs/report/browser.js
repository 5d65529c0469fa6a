"use strict";
(() => {
  const browser = document.getElementById("browser");
  if (!browser) return;
  const controls = browser.querySelector("form");
  const samples = Array.from(browser.querySelectorAll(".samples > .sample"));
  const selects = Array.from(controls.querySelectorAll("select"));
  const shown = controls.querySelector("output");
  const update = () => {
    const wanted = selects.filter((select) => select.value !== "");
    let count = 0;
    for (const sample of samples) {
      const fits = wanted.every((select) => sample.dataset[select.name] === select.value);
      sample.hidden = !fits;
      if (fits) count += 1;
    }
    shown.textContent = `${count} of ${samples.length} shown`;
  };
  controls.addEventListener("change", update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  update();
})();

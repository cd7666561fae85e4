// Light or dark as chosen before, set before anything is drawn. A classic script: modules run too late for that.
"use strict";
(() => {
  try {
    const theme = localStorage.getItem("glottoscope-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage may be forbidden: the system's choice then holds.
  }
})();

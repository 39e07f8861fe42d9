// The theme: the system's, or the one chosen here, which the browser stores. Runs before the page is drawn, to avoid a flash.
"use strict";

(() => {
  const root = document.documentElement;
  const choices = { auto: "Auto", light: "Light", dark: "Dark" };

  // The browser may deny the page its storage.
  function kept() {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null;
    }
  }

  function choose(theme) {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // The choice lasts until the page is left.
    }
    dispatchEvent(new Event("themechange"));
  }

  function drawSwitch() {
    const group = document.createElement("div");
    group.className = "choices";
    group.setAttribute("role", "radiogroup");
    group.setAttribute("aria-label", "Theme");
    for (const [theme, name] of Object.entries(choices)) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "theme", value: theme, checked: (root.dataset.theme ?? "auto") === theme });
      input.addEventListener("change", () => choose(theme));
      label.append(input, name);
      group.append(label);
    }
    document.getElementById("theme").append(group);
  }

  if (kept() === "light" || kept() === "dark") root.dataset.theme = kept();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
  document.addEventListener("DOMContentLoaded", drawSwitch);
})();

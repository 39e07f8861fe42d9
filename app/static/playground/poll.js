// Calls `look` repeatedly while the page is visible. It returns after how many milliseconds from its start to call it again.
export async function poll(look) {
  for (;;) {
    if (document.hidden) await seen();
    const started = performance.now();
    const pause = await look();
    await new Promise((resolve) => { setTimeout(resolve, Math.max(0, pause - (performance.now() - started))); });
  }
}

function seen() {
  return new Promise((resolve) => { document.addEventListener("visibilitychange", resolve, { once: true }); });
}

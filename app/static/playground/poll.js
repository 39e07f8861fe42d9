// Calls `look` again and again while the page is in view; each call says after how many milliseconds, from its start, the next is due.
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

"use strict";

const root = document.documentElement;

// Figures name colours as CSS variables; Plotly wants the colours themselves.
function painted(value, style) {
  if (typeof value === "string") return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  if (Array.isArray(value)) return value.map((each) => painted(each, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, painted(each, style)]));
}

function draw() {
  const style = getComputedStyle(root), config = { displayModeBar: false, responsive: true };
  for (const place of document.querySelectorAll(".chart")) {
    const { data, layout } = JSON.parse(place.nextElementSibling.textContent);
    Plotly.react(place, painted(data, style), { ...painted(layout, style), width: place.clientWidth }, config);
  }
}

async function load() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function start() {
  try {
    await load();
    draw();
  } catch (error) {
    // the tables have the same values
    document.querySelectorAll(".chart").forEach((place) => { place.textContent = "This browser cannot draw the figure; its values stand below."; place.style.height = "auto"; });
    document.querySelectorAll("figure > details").forEach((details) => { details.open = true; });
    console.error(error);
    return;
  }
  let asked = 0;
  const again = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(draw); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("resize", again);
  addEventListener("toggle", again, true);  // what is folded away has no width
  addEventListener("beforeprint", () => { root.classList.add("print"); draw(); });
  addEventListener("afterprint", () => { root.classList.remove("print"); draw(); });
  root.dataset.drawn = "yes";
  const seconds = Number(document.body.dataset.refresh);
  if (seconds) watch(seconds);
}

// Asks the server of `r1p watch` for what changed; the page stays where it was scrolled and unfolded to.
async function watch(seconds) {
  const live = document.getElementById("live"), main = document.getElementById("main");
  let tag = "";
  for (;;) {
    await new Promise((done) => setTimeout(done, 1000 * seconds));
    try {
      const answer = await fetch(`${location.pathname}?have=${encodeURIComponent(tag)}`, { headers: { "X-Part": "main" } });
      if (answer.status === 200) {
        const open = [...document.querySelectorAll("details[open]")].map((details) => details.id);
        const chosen = [...document.querySelectorAll("input:checked")].map((input) => [input.name, input.value]);
        main.innerHTML = await answer.text();
        open.forEach((id) => { if (id) document.getElementById(id)?.setAttribute("open", ""); });
        chosen.forEach(([name, value]) => { const input = document.querySelector(`input[name="${CSS.escape(name)}"][value="${value}"]`); if (input) input.checked = true; });
        draw();
        tag = answer.headers.get("x-tag");
      }
      if (answer.headers.get("x-ended")) { live.textContent = "the run has ended"; return; }
      live.textContent = `as of ${new Date().toLocaleTimeString()}`;
    } catch {
      live.textContent = "the server does not answer; is r1p watch still running?";
    }
  }
}

start();

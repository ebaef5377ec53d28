const root = document.documentElement, slides = [...document.querySelectorAll(".slide")];
const parts = (slide) => [...slide.querySelectorAll(".part")];
const last = (slide) => Math.max(...parts(slide).map((part) => +part.dataset.step));
let at = 0, step = 0;

function fit(slide) { // the largest type that fits; text is never below 20 px, code never below 18
  const lines = [...slide.querySelectorAll("pre")].flatMap((pre) => pre.textContent.split("\n"));
  const widest = 1870 / Math.max(1, ...lines.map((line) => line.length).filter((n) => n < 105));
  for (let size = slide.querySelector("img") ? 1 : 1.4; size > 0.73; size -= 0.03) {
    slide.style.setProperty("--text", `${Math.max(20, 27 * size)}px`);
    slide.style.setProperty("--code", `${Math.max(18, Math.min(21 * size, widest))}px`);
    const narrow = parts(slide).every((part) => part.scrollWidth <= part.clientWidth);
    if (narrow && slide.scrollHeight <= 720) return;
  }
}

function show(slide, to = 0) {
  at = Math.min(Math.max(slide, 0), slides.length - 1);
  step = Math.min(to, last(slides[at]));
  slides.forEach((each, i) => each.classList.toggle("now", i === at));
  parts(slides[at]).forEach((part) => part.classList.toggle("later", part.dataset.step > step));
  history.replaceState(null, "", `#${at + 1}`);
  slides[at].focus({ preventScroll: true });
}

const next = () => (step < last(slides[at]) ? show(at, step + 1) : slides[at + 1] && show(at + 1));
const back = () => (step > 0 ? show(at, step - 1) : at > 0 && show(at - 1, Infinity));
const named = () => show((parseInt(location.hash.slice(1)) || 1) - 1);
const zoom = () => root.style.setProperty("--zoom", Math.min(innerWidth / 1280, innerHeight / 720));
const keys = { ArrowRight: next, ArrowDown: next, PageDown: next, " ": next,
  ArrowLeft: back, ArrowUp: back, PageUp: back, Backspace: back,
  Home: () => show(0), End: () => show(slides.length - 1) };
addEventListener("keydown", (event) => {
  if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  (event.key === " " && event.shiftKey ? back : keys[event.key])();
});
addEventListener("click", (event) => (event.clientX < innerWidth / 4 ? back : next)());
addEventListener("resize", zoom);
addEventListener("hashchange", named);
root.classList.add("live"); zoom(); slides.forEach(fit); named();

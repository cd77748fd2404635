"use strict";
const audit = JSON.parse(document.getElementById("audit").textContent);
const names = new Set(JSON.parse(document.getElementById("names").textContent));
const PAGE = 48;
const get = id => document.getElementById(id);
const cards = [...get("sheet").children];
const storageKey = ["ns-audit", audit.label_set, audit.selection, audit.seed, audit.requested].join(" ");
let page = 0;
let shown = [];

// Answers stay in the browser, so closing the page by mistake loses nothing.
try {
  const kept = JSON.parse(localStorage.getItem(storageKey) || "{}");
  for (const image of audit.images) Object.assign(image, kept[image.key]);
} catch { /* Without storage, answers last until the page is closed. */ }

function storeAnswers() {
  const kept = {};
  for (const { key, wrong, correct_class, reviewed } of audit.images) if (reviewed) kept[key] = { wrong, correct_class, reviewed };
  try { localStorage.setItem(storageKey, JSON.stringify(kept)); } catch { /* As above. */ }
}

function drawCard(index) {
  const card = cards[index], image = audit.images[index], field = card.querySelector("input");
  card.classList.toggle("wrong", image.wrong);
  card.classList.toggle("reviewed", image.reviewed);
  card.querySelector("button").setAttribute("aria-pressed", image.wrong);
  field.hidden = !image.wrong;
  if (document.activeElement !== field) field.value = image.correct_class ?? "";
}

function showCounts() {
  const reviewed = audit.images.filter(image => image.reviewed).length;
  const wrong = audit.images.filter(image => image.wrong).length;
  get("counter").textContent = `${reviewed} of ${audit.images.length} reviewed, ${wrong} wrong`;
}

function showPage() {
  const className = get("class").value, state = get("state").value;
  const matching = audit.images.map((_, index) => index).filter(index => {
    const image = audit.images[index];
    return (!className || image.class_name === className) && (state !== "new" || !image.reviewed) && (state !== "wrong" || image.wrong);
  });
  const pages = Math.max(1, Math.ceil(matching.length / PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  shown = matching.slice(page * PAGE, (page + 1) * PAGE);
  const visible = new Set(shown);
  cards.forEach((card, index) => { card.hidden = !visible.has(index); drawCard(index); });
  get("page").textContent = matching.length ? `Page ${page + 1} of ${pages}` : "None.";
  get("back").disabled = page === 0;
  showCounts();
}

function toggleWrong(index) {
  const image = audit.images[index];
  image.wrong = !image.wrong;
  image.reviewed = true;
  if (!image.wrong) image.correct_class = null;
  cards[index].querySelector("input").removeAttribute("aria-invalid");
  drawCard(index); showCounts(); storeAnswers();
}

function nameClass(index) {
  const image = audit.images[index], field = cards[index].querySelector("input"), value = field.value.trim();
  const known = names.has(value) && value !== image.class_name;
  image.correct_class = known ? value : null;
  if (value && !known) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
  storeAnswers();
}

function goOn() {
  for (const index of shown) audit.images[index].reviewed = true;
  // With "not reviewed", the images that follow move up without a page turn.
  if (get("state").value !== "new") page += 1;
  storeAnswers(); showPage();
  cards[shown[0]]?.querySelector("button").focus({ preventScroll: true });
  get("sheet").scrollIntoView();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(audit, null, 1)], { type: "application/json" }));
  link.download = "audit.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

cards.forEach((card, index) => {
  card.querySelector("button").addEventListener("click", () => toggleWrong(index));
  card.querySelector("input").addEventListener("input", () => nameClass(index));
});
for (const id of ["class", "state"]) get(id).addEventListener("change", () => { page = 0; showPage(); });
get("back").addEventListener("click", () => { page -= 1; showPage(); });
get("next").addEventListener("click", goOn);
get("download").addEventListener("click", download);

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const card = event.target.closest("#sheet li");
  if (event.target.matches("input")) {
    if (card && (event.key === "Escape" || event.key === "Enter")) {
      // Otherwise the Enter that leaves the field would also press the button.
      event.preventDefault();
      card.querySelector("button").focus();
    }
    return;
  }
  const index = card ? cards.indexOf(card) : -1;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) {
    const next = shown[index < 0 ? 0 : shown.indexOf(index) + step];
    if (next !== undefined) cards[next].querySelector("button").focus();
  } else if (event.key === "w" && index >= 0) {
    toggleWrong(index);
  } else if (event.key === "c" && index >= 0) {
    if (!audit.images[index].wrong) toggleWrong(index);
    cards[index].querySelector("input").focus();
  } else if (event.key === "n") {
    goOn();
  } else {
    return;
  }
  event.preventDefault();
});

// A printout shows all pictures, whichever page is open.
addEventListener("beforeprint", () => cards.forEach(card => { card.hidden = false; }));
addEventListener("afterprint", showPage);
showPage();

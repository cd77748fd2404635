"use strict";
const audit = JSON.parse(document.getElementById("audit").textContent);
const names = new Set(JSON.parse(document.getElementById("names").textContent));
const PAGE = 48;
const get = id => document.getElementById(id);
const cards = [...get("sheet").children];
const place = ["ns-audit", audit.label_set, audit.selection, audit.seed, audit.asked].join(" ");
let page = 0;
let shown = [];

// Answers stay in the browser: a page that is closed by mistake has lost nothing.
try {
  const kept = JSON.parse(localStorage.getItem(place) || "{}");
  for (const image of audit.images) Object.assign(image, kept[image.key]);
} catch { /* A browser without storage only forgets. */ }

function keep() {
  const kept = {};
  for (const { key, wrong, correct_class, looked } of audit.images) if (looked) kept[key] = { wrong, correct_class, looked };
  try { localStorage.setItem(place, JSON.stringify(kept)); } catch { /* As above. */ }
}

function draw(index) {
  const card = cards[index], image = audit.images[index], field = card.querySelector("input");
  card.classList.toggle("wrong", image.wrong);
  card.classList.toggle("looked", image.looked);
  card.querySelector("button").setAttribute("aria-pressed", image.wrong);
  field.hidden = !image.wrong;
  if (document.activeElement !== field) field.value = image.correct_class ?? "";
}

function count() {
  const looked = audit.images.filter(image => image.looked).length;
  const wrong = audit.images.filter(image => image.wrong).length;
  get("counter").textContent = `${looked} of ${audit.images.length} looked at, ${wrong} wrong`;
}

function lay() {
  const label = get("class").value, state = get("state").value;
  const matching = audit.images.map((_, index) => index).filter(index => {
    const image = audit.images[index];
    return (!label || image.class === label) && (state !== "new" || !image.looked) && (state !== "wrong" || image.wrong);
  });
  const pages = Math.max(1, Math.ceil(matching.length / PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  shown = matching.slice(page * PAGE, (page + 1) * PAGE);
  const visible = new Set(shown);
  cards.forEach((card, index) => { card.hidden = !visible.has(index); draw(index); });
  get("page").textContent = matching.length ? `Page ${page + 1} of ${pages}` : "None.";
  get("back").disabled = page === 0;
  count();
}

function mark(index) {
  const image = audit.images[index];
  image.wrong = !image.wrong;
  image.looked = true;
  if (!image.wrong) image.correct_class = null;
  cards[index].querySelector("input").removeAttribute("aria-invalid");
  draw(index); count(); keep();
}

function name(index) {
  const image = audit.images[index], field = cards[index].querySelector("input"), value = field.value.trim();
  const known = names.has(value) && value !== image.class;
  image.correct_class = known ? value : null;
  if (value && !known) field.setAttribute("aria-invalid", "true"); else field.removeAttribute("aria-invalid");
  keep();
}

function goOn() {
  for (const index of shown) audit.images[index].looked = true;
  // With "not looked at", those that follow move up by themselves.
  if (get("state").value !== "new") page += 1;
  keep(); lay();
  cards[shown[0]]?.querySelector("button").focus({ preventScroll: true });
  get("sheet").scrollIntoView();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(audit, null, 1)], { type: "application/json" }));
  link.download = "audit.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

cards.forEach((card, index) => {
  card.querySelector("button").addEventListener("click", () => mark(index));
  card.querySelector("input").addEventListener("input", () => name(index));
});
for (const id of ["class", "state"]) get(id).addEventListener("change", () => { page = 0; lay(); });
get("back").addEventListener("click", () => { page -= 1; lay(); });
get("next").addEventListener("click", goOn);
get("download").addEventListener("click", save);

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const card = event.target.closest("#sheet li");
  if (event.target.matches("input")) {
    if (card && (event.key === "Escape" || event.key === "Enter")) {
      // Or the Enter that leaves the field would press the button.
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
    mark(index);
  } else if (event.key === "c" && index >= 0) {
    if (!audit.images[index].wrong) mark(index);
    cards[index].querySelector("input").focus();
  } else if (event.key === "n") {
    goOn();
  } else {
    return;
  }
  event.preventDefault();
});

// Printed, all pictures are there, whichever page is open.
addEventListener("beforeprint", () => cards.forEach(card => { card.hidden = false; }));
addEventListener("afterprint", lay);
lay();

// The keyboard reaches what scrolls sideways.
document$.subscribe(() =>
  requestAnimationFrame(() =>
    document.querySelectorAll("pre code, .md-typeset__scrollwrap").forEach((region) => { region.tabIndex = 0; })));

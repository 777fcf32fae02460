// The page of a study: who rates, the pair in step, the three answers. The server keeps all state; this only shows it.
const root = element.querySelector(".study");
const find = (selector) => root.querySelector(selector);
const videos = [...root.querySelectorAll("video")];
const answers = [...root.querySelectorAll(".answers button")];
const form = find("form");
const seek = find(".seek");
const STORED_RATER = "attention-surgery.rater";
const SETTLE_MS = 500; // a click aimed at the last pair must not answer the next one

let question = null; // the pair on screen
let shownAt = 0;
let watched = false; // both played to their end
let sending = false;
let wantsPlay = false; // what the rater asked for; a video that buffers holds both back
let failed = false; // a video does not load

find(".heading").textContent = props.heading;
find(".question").textContent = props.question;
form.rater.maxLength = props.max_rater_length;

// --- talking to the server ------------------------------------------------------------------------------------------

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function call(ask) {
  for (;;) {
    // A request that does not come through throws, or resolves to nothing. Asking twice is safe: a pair has one answer.
    const reply = await ask().catch(() => undefined);
    find(".offline").hidden = Boolean(reply);
    if (reply) return reply;
    await pause(1000);
  }
}

async function enter(rater) {
  const state = await call(() => server.enter(rater));
  find(".error").textContent = state.error ?? "";
  if (state.error) return show(null);
  localStorage.setItem(STORED_RATER, state.rater);
  show(state);
}

async function answer(choice) {
  if (sending || !question || locked()) return;
  sending = true;
  refresh();
  const token = question.token;
  const state = await call(() => server.vote({ token, choice }));
  sending = false;
  if (question?.token !== token) return; // left in the meantime
  if (state.error) {
    find(".hint").textContent = state.error;
    return;
  }
  show(state);
}

// --- what is on screen ----------------------------------------------------------------------------------------------

function show(state) {
  question = state?.question ?? null;
  root.dataset.screen = !state ? "enter" : question ? "pair" : "done";
  if (!state) {
    stop();
    form.rater.focus();
    return;
  }
  for (const count of root.querySelectorAll(".count")) {
    count.textContent = question ? `${state.done + 1} / ${state.total}` : `${state.total} of ${state.total} answered.`;
  }
  find("progress").value = state.done / state.total;
  find(".who").textContent = state.rater;
  if (!question) return stop();
  find(".caption").textContent = question.caption ?? "";
  find(".caption").hidden = !question.caption;
  load(question);
}

function locked() {
  return failed || performance.now() - shownAt < SETTLE_MS || (props.watch_fully && !watched);
}

function refresh() {
  const shut = sending || !question || locked();
  for (const button of answers) button.disabled = shut;
  root.toggleAttribute("data-playing", wantsPlay);
  if (!question) return;
  if (failed) find(".hint").textContent = "A video does not load; trying again…";
  else if (sending) find(".hint").textContent = "Saving…";
  else if (shut && props.watch_fully && !watched) find(".hint").textContent = "Watch both to the end to answer.";
  else find(".hint").textContent = "";
}

// --- two videos in step ---------------------------------------------------------------------------------------------

function load({ left, right }) {
  watched = failed = false;
  wantsPlay = true;
  shownAt = performance.now();
  [left, right].forEach((token, index) => {
    videos[index].src = `videos/${token}`;
    videos[index].load();
  });
  seek.value = 0;
  refresh();
}

function stop() {
  wantsPlay = false;
  for (const video of videos) {
    video.removeAttribute("src");
    video.load();
  }
  refresh();
}

const duration = () => Math.min(...videos.map((video) => video.duration || 0));
const ended = () => videos.every((video) => video.ended);
const canGoOn = (video) => video.ended || (video.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA && !video.seeking);

function moveTo(time) {
  for (const video of videos) video.currentTime = time;
}

function wasPlayedThrough(video) {
  let played = 0;
  for (let index = 0; index < video.played.length; index++) played += video.played.end(index) - video.played.start(index);
  return played >= 0.9 * video.duration;
}

function keepInStep() {
  if (question && !failed) {
    if (ended()) {
      watched ||= videos.every(wasPlayedThrough);
      if (wantsPlay) moveTo(0); // both again from the start, and in step
    }
    const go = wantsPlay && videos.every(canGoOn);
    for (const video of videos) {
      if (go && video.paused && !video.ended) video.play().catch(() => {});
      if (!go && !video.paused) video.pause();
    }
    const lead = videos[0].currentTime - videos[1].currentTime;
    if (go && !videos.some((video) => video.ended)) {
      if (Math.abs(lead) > 0.2) videos[1].currentTime = videos[0].currentTime;
      videos[1].playbackRate = Math.abs(lead) > 0.015 ? 1 + Math.max(-0.2, Math.min(0.2, 2 * lead)) : 1;
    }
    if (duration() && document.activeElement !== seek) seek.value = videos[0].currentTime / duration();
    refresh();
  }
  requestAnimationFrame(keepInStep);
}

for (const video of videos) {
  video.addEventListener("loadedmetadata", () => {
    root.style.setProperty("--ratio", `${video.videoWidth} / ${video.videoHeight}`);
  });
  video.addEventListener("error", () => {
    if (!question || failed) return;
    failed = true;
    refresh();
    const asked = question;
    setTimeout(() => question === asked && load(asked), 1500);
  });
}

// --- hands ----------------------------------------------------------------------------------------------------------

function togglePlay() {
  wantsPlay = !wantsPlay;
  refresh();
}

function replay() {
  wantsPlay = true;
  moveTo(0);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  enter(form.rater.value);
});
for (const button of answers) button.addEventListener("click", () => answer(button.dataset.choice));
find(".play").addEventListener("click", togglePlay);
find(".replay").addEventListener("click", replay);
seek.addEventListener("input", () => {
  wantsPlay = false;
  moveTo(seek.value * duration());
});
seek.addEventListener("change", () => seek.blur());
for (const button of root.querySelectorAll(".leave")) {
  button.addEventListener("click", () => {
    localStorage.removeItem(STORED_RATER);
    form.rater.value = "";
    show(null);
  });
}

const KEYS = {
  a: () => answer("left"),
  arrowleft: () => answer("left"),
  b: () => answer("right"),
  arrowright: () => answer("right"),
  n: () => answer("none"),
  arrowdown: () => answer("none"),
  " ": togglePlay,
  r: replay,
};
document.addEventListener("keydown", (event) => {
  const act = KEYS[event.key.toLowerCase()];
  if (!act || !question || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === seek && event.key.startsWith("Arrow")) return;
  event.preventDefault(); // the space bar would press the button that has the focus, too
  act();
});

const known = localStorage.getItem(STORED_RATER);
if (known) enter(known);
else show(null);
requestAnimationFrame(keepInStep);

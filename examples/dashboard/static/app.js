"use strict";

const HISTORY_SECONDS = 60;
const MAX_RETRY_MS = 10_000;
const LOG_LINES = 12;

const byId = (id) => document.getElementById(id);
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

// ── Connection state ────────────────────────────────────────────────────────────────────────────────────────────

function show(state, text) {
  byId("state").className = `state ${state}`;
  byId("state").textContent = text;
}

// ── Measurements by WebSocket ───────────────────────────────────────────────────────────────────────────────────

let samples = [];
let ahead = 0; // seconds that the station's clock is ahead of ours
let retry = 500;

function connect() {
  const socket = new WebSocket(new URL("live", location.href).href.replace(/^http/, "ws"));
  socket.onopen = () => {
    retry = 500;
    show("live", "Live");
  };
  socket.onmessage = (event) => {
    const data = JSON.parse(event.data);
    if (data.history) samples = data.history;
    if (!data.sample) return;
    samples.push(data.sample);
    ahead = data.sample.at - Date.now() / 1000;
    while (samples.length && samples[0].at < data.sample.at - HISTORY_SECONDS - 1) samples.shift();
    byId("flow").textContent = data.sample.flow.toFixed(1);
    byId("pressure").textContent = data.sample.pressure.toFixed(2);
    byId("motor").textContent = data.sample.motor.toFixed(1);
    byId("viewers").textContent = data.viewers;
  };
  socket.onclose = () => {
    show("lost", "Cut off");
    setTimeout(connect, retry);
    retry = Math.min(retry * 2, MAX_RETRY_MS);
  };
}

// ── Chart ───────────────────────────────────────────────────────────────────────────────────────────────────────

const SERIES = [
  { name: "flow", low: 80, high: 160, side: "left", digits: 0 },
  { name: "pressure", low: 3, high: 5, side: "right", digits: 1 },
];
const GRID_LINES = 4;
const MARGIN = { left: 40, right: 36, top: 8, bottom: 24 };

function draw() {
  const canvas = byId("chart");
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, sans-serif";

  const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
  const now = Date.now() / 1000 + ahead;
  const x = (at) => MARGIN.left + inner.w * (1 - (now - at) / HISTORY_SECONDS);
  const y = (series, value) => MARGIN.top + inner.h * (1 - (value - series.low) / (series.high - series.low));

  pen.strokeStyle = colour("line");
  pen.lineWidth = 1;
  pen.textBaseline = "middle";
  for (let i = 0; i <= GRID_LINES; i++) {
    const line = Math.round(MARGIN.top + (inner.h * i) / GRID_LINES) + 0.5;
    pen.beginPath();
    pen.moveTo(MARGIN.left, line);
    pen.lineTo(width - MARGIN.right, line);
    pen.stroke();
    for (const series of SERIES) {
      const value = series.high - ((series.high - series.low) * i) / GRID_LINES;
      pen.fillStyle = colour(series.name);
      pen.textAlign = series.side === "left" ? "right" : "left";
      pen.fillText(value.toFixed(series.digits), series.side === "left" ? MARGIN.left - 8 : width - MARGIN.right + 8, line);
    }
  }
  pen.fillStyle = colour("muted");
  pen.textAlign = "center";
  for (let ago = 0; ago <= HISTORY_SECONDS; ago += 15) {
    pen.fillText(ago ? `−${ago} s` : "now", x(now - ago), height - 9);
  }

  pen.save();
  pen.beginPath();
  pen.rect(MARGIN.left, 0, inner.w, height);
  pen.clip();
  for (const series of SERIES) {
    if (samples.length < 2) continue;
    pen.beginPath();
    for (const sample of samples) pen.lineTo(x(sample.at), y(series, sample[series.name]));
    pen.strokeStyle = colour(series.name);
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.stroke();
    if (series.side === "left") {
      pen.lineTo(x(samples[samples.length - 1].at), MARGIN.top + inner.h);
      pen.lineTo(x(samples[0].at), MARGIN.top + inner.h);
      pen.fillStyle = colour("fill");
      pen.fill();
    }
  }
  pen.restore();
  requestAnimationFrame(draw);
}

// ── Log by server-sent events ───────────────────────────────────────────────────────────────────────────────────

function follow() {
  const source = new EventSource("log");
  source.onmessage = (event) => {
    const entry = JSON.parse(event.data);
    const line = document.createElement("li");
    const time = document.createElement("time");
    const text = document.createElement("span");
    time.textContent = clock(entry.at);
    text.textContent = entry.text;
    text.className = entry.level;
    line.append(time, text);
    byId("log").prepend(line);
    while (byId("log").children.length > LOG_LINES) byId("log").lastChild.remove();
  };
}

// ── Form ────────────────────────────────────────────────────────────────────────────────────────────────────────

function showNotes(notes) {
  if (!notes.length) return;
  byId("notes").replaceChildren(
    ...notes.map((note) => {
      const item = document.createElement("li");
      const by = document.createElement("small");
      by.textContent = `${note.by}, ${clock(note.at)}`;
      item.append(note.text, by);
      return item;
    }),
  );
}

async function loadNotes() {
  const answer = await fetch("notes");
  if (answer.ok) showNotes(await answer.json());
}

byId("note").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await fetch("notes", {
    method: "POST",
    headers: { Accept: "application/json" },
    body: new URLSearchParams(new FormData(event.target)),
  });
  if (!answer.ok) return show("lost", `Note refused (${answer.status})`);
  event.target.reset();
  showNotes(await answer.json());
});

// ── Upload ──────────────────────────────────────────────────────────────────────────────────────────────────────

byId("upload").addEventListener("submit", (event) => {
  event.preventDefault();
  const file = byId("file").files[0];
  const button = event.target.querySelector("button");
  const request = new XMLHttpRequest(); // fetch() cannot tell how much of an upload is sent
  request.open("POST", "upload");
  request.upload.onprogress = (sent) => (byId("progress").value = sent.loaded / sent.total);
  request.onload = () => {
    if (request.status !== 200) return (byId("uploaded").textContent = `Refused (${request.status}).`);
    const got = JSON.parse(request.responseText);
    byId("progress").value = 1;
    byId("uploaded").textContent = `${got.bytes.toLocaleString()} bytes in ${got.seconds} s. SHA-256 ${got.sha256}`;
  };
  request.onerror = () => (byId("uploaded").textContent = "The connection broke.");
  request.onloadend = () => (button.disabled = false);
  button.disabled = true;
  request.send(file);
});

connect();
follow();
loadNotes();
draw();

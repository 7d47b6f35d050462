// Node's http server, saying what it was given: `node node_echo.js NAME PORT LOG`.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const http = require("node:http");

const [, , , port, path] = process.argv;
const log = fs.openSync(path, "a");
const BODYLESS = { "/status/204": 204, "/status/304": 304 };

function answer(request, response) {
  const digest = crypto.createHash("sha256");
  let length = 0;
  request.on("data", (part) => {
    digest.update(part);
    length += part.length;
  });
  request.on("end", () => {
    const seen = {
      method: request.method,
      target: request.url,
      length,
      sha256: digest.digest("hex"),
      connection: String(request.socket.remotePort),
    };
    fs.writeSync(log, JSON.stringify(seen) + "\n");
    const route = request.url.split("?")[0];
    if (route === "/early-hints") {
      response.writeEarlyHints({ link: "</style.css>; rel=preload; as=style" });
    }
    const fields = [];
    for (let at = 0; at < request.rawHeaders.length; at += 2) {
      fields.push([request.rawHeaders[at], request.rawHeaders[at + 1]]);
    }
    const trailers = request.rawTrailers;
    const status = BODYLESS[route] ?? 200;
    response.setHeader("X-Seen", JSON.stringify(seen));
    if (status !== 200) {
      response.writeHead(status).end();
      return;
    }
    if (route === "/trailers") {
      response.writeHead(200, { Trailer: "X-Checksum", "Content-Type": "application/json" });
      response.addTrailers({ "X-Checksum": "abc", "X-Guestpass-Email": "eve@evil.example" });
      response.end(JSON.stringify({ fields, trailers, cgi: false }));
      return;
    }
    response.writeHead(200, { "Content-Type": "application/json" });
    response.end(JSON.stringify({ fields, trailers, cgi: false }));
  });
}

http.createServer(answer).listen(Number(port), "127.0.0.1", () => console.log("ready"));

// Who is there? Verifies the assertions that Guestpass sends to an application: `npm install jose`.
//
//     node verify.mjs https://share.example.com plant/dashboards < assertions
//
// One assertion a line, of X-Guestpass-Assertion; prints the address that it proves, or why it is refused.

import { createInterface } from "node:readline";
import { createRemoteJWKSet, jwtVerify } from "jose";

const [edge, audience] = process.argv.slice(2);

// Once for the life of the application: it keeps the keys, and fetches them again when a new one signs.
const keys = createRemoteJWKSet(new URL("/.well-known/jwks.json", edge));

async function email(assertion) {
  const { payload } = await jwtVerify(assertion, keys, {
    algorithms: ["EdDSA"], // never the one that the assertion names
    issuer: edge,
    audience,
    requiredClaims: ["exp", "iat", "email"],
  });
  return payload.email;
}

for await (const line of createInterface({ input: process.stdin })) {
  try {
    console.log(await email(line.trim()));
  } catch (error) {
    console.log(`refused: ${error.message}`);
  }
}

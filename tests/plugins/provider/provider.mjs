// A certified OpenID provider with three accounts, for the tests: `node provider.mjs` prints its issuer when it
// listens. Whoever is asked for in `login_hint` or typed into the page is signed in; there are no passwords.
//
// Clients: "basic" and "post" with the secret "a secret, with = and %", "public" without one.

import { generateKeyPairSync } from 'node:crypto'
import { createServer } from 'node:http'

import Provider from 'oidc-provider'

const accounts = {
  verified: { email: 'alice@example.org', email_verified: true },
  unverified: { email: 'alice@example.org', email_verified: false },
  silent: { email: 'alice@example.org' },
}

// Edges of tests listen on any port; what was asked for at the beginning still has to be repeated at the token endpoint.
const redirect_uris = ['http://localhost/callback/any']
const secret = 'a secret, with = and %'
const client = (client_id, token_endpoint_auth_method) => ({
  client_id,
  redirect_uris,
  token_endpoint_auth_method,
  ...(token_endpoint_auth_method === 'none' ? {} : { client_secret: secret }),
  ...(client_id === 'es256' ? { id_token_signed_response_alg: 'ES256' } : {}),
})

const server = createServer()
server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`
  const key = (kid, alg, type, options) => ({
    ...generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' }),
    kid,
    alg,
    use: 'sig',
  })
  const provider = new Provider(issuer, {
    clients: [
      client('basic', 'client_secret_basic'),
      client('post', 'client_secret_post'),
      client('public', 'none'),
      client('es256', 'client_secret_basic'),
    ],
    findAccount: (_, id) => (accounts[id] ? { accountId: id, claims: () => ({ sub: id, ...accounts[id] }) } : undefined),
    claims: { openid: ['sub'], email: ['email', 'email_verified'] },
    conformIdTokenClaims: false,
    enabledJWA: { idTokenSigningAlgValues: ['RS256', 'ES256'] },
    pkce: { required: () => true },
    responseTypes: ['code'],
    features: { devInteractions: { enabled: true } },
    cookies: { keys: ['only for tests'] },
    jwks: {
      keys: [
        key('one', 'RS256', 'rsa', { modulusLength: 2048 }),
        key('two', 'ES256', 'ec', { namedCurve: 'P-256' }),
      ],
    },
    ttl: { AccessToken: 60, AuthorizationCode: 60, IdToken: 60, Interaction: 600, Session: 600, Grant: 600 },
  })
  provider.Client.prototype.redirectUriAllowed = (uri) => new URL(uri).pathname.startsWith('/callback/')
  server.on('request', provider.callback())
  console.log(JSON.stringify({ issuer }))
})

for (const signal of ['SIGTERM', 'SIGINT']) process.on(signal, () => process.exit(0))

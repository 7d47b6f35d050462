// Passkeys for a form (WebAuthn). The form is whole without this script: its button stays hidden where the browser has
// no passkeys, and the answer is one more field of the same form, checked on the server like everything that is typed.
'use strict'
;(() => {
  const button = document.querySelector('[data-passkey]')
  if (!button || !window.PublicKeyCredential || !navigator.credentials) return
  const form = button.form
  const problem = document.querySelector('[data-passkey-problem]')
  const kind = button.dataset.passkey

  const decode = (text) =>
    Uint8Array.from(atob(text.replace(/-/g, '+').replace(/_/g, '/')), (c) => c.charCodeAt(0)).buffer
  const encode = (buffer) =>
    btoa(String.fromCharCode(...new Uint8Array(buffer)))
      .replace(/\+/g, '-')
      .replace(/\//g, '_')
      .replace(/=+$/, '')

  // What the server may know of this browser before it offers to make a passkey: that it can.
  const able = PublicKeyCredential.isUserVerifyingPlatformAuthenticatorAvailable()
  if (kind === 'probe') {
    able.then((can) => {
      form.elements.passkeys.value = can ? '1' : ''
    })
    return
  }

  const ask = async () => {
    const options = JSON.parse(button.dataset.options)
    options.challenge = decode(options.challenge)
    if (options.user) options.user.id = decode(options.user.id)
    const found =
      kind === 'create'
        ? await navigator.credentials.create({ publicKey: options })
        : await navigator.credentials.get({ publicKey: options })
    const response = { clientDataJSON: encode(found.response.clientDataJSON) }
    if (kind === 'create') {
      response.attestationObject = encode(found.response.attestationObject)
    } else {
      response.authenticatorData = encode(found.response.authenticatorData)
      response.signature = encode(found.response.signature)
      if (found.response.userHandle) response.userHandle = encode(found.response.userHandle)
    }
    return JSON.stringify({ id: found.id, rawId: encode(found.rawId), type: found.type, response })
  }

  button.hidden = false
  button.addEventListener('click', async () => {
    button.disabled = true
    problem.hidden = true
    try {
      form.elements.credential.value = await ask()
      form.submit()
    } catch {
      // Cancelled, or there is none on this device: the other way is on the same page.
      problem.hidden = false
      button.disabled = false
    }
  })
})()

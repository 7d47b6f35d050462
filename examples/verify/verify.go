// Who is there? Verifies the assertions that Guestpass sends to an application, with the standard library alone.
//
//	go run verify.go https://share.example.com plant/dashboards < assertions
//
// One assertion a line, of X-Guestpass-Assertion; prints the address that it proves, or why it is refused.
package main

import (
	"bufio"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// How long the keys are kept, and how soon they are fetched again for one that is unknown.
const (
	keep  = 5 * time.Minute
	retry = 10 * time.Second
)

// Verifier is one for the life of the application.
type Verifier struct {
	Edge, Audience string

	mutex   sync.Mutex
	keys    map[string]ed25519.PublicKey
	fetched time.Time
}

type claims struct {
	Issuer   string `json:"iss"`
	Audience string `json:"aud"`
	Email    string `json:"email"`
	Expires  int64  `json:"exp"`
}

// Email returns the address that the assertion proves.
func (v *Verifier) Email(assertion string) (string, error) {
	parts := strings.Split(assertion, ".")
	if len(parts) != 3 {
		return "", errors.New("not an assertion")
	}
	var header struct{ Alg, Kid string }
	if err := decode(parts[0], &header); err != nil {
		return "", err
	}
	if header.Alg != "EdDSA" { // compared, never used to choose
		return "", fmt.Errorf("the algorithm is %q", header.Alg)
	}
	key, err := v.key(header.Kid)
	if err != nil {
		return "", err
	}
	signature, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
	if err != nil {
		return "", err
	}
	if !ed25519.Verify(key, []byte(parts[0]+"."+parts[1]), signature) {
		return "", errors.New("the signature is wrong")
	}
	var found claims
	if err := decode(parts[1], &found); err != nil {
		return "", err
	}
	switch {
	case found.Issuer != v.Edge:
		return "", fmt.Errorf("the issuer is %q", found.Issuer)
	case found.Audience != v.Audience:
		return "", fmt.Errorf("the audience is %q", found.Audience)
	case time.Now().Unix() >= found.Expires:
		return "", errors.New("it has expired")
	case found.Email == "":
		return "", errors.New("it names nobody")
	}
	return found.Email, nil
}

func (v *Verifier) key(id string) (ed25519.PublicKey, error) {
	v.mutex.Lock()
	defer v.mutex.Unlock()
	age := time.Since(v.fetched)
	key, known := v.keys[id]
	if age > keep || (!known && age > retry) {
		if err := v.fetch(); err != nil {
			return nil, err
		}
		key, known = v.keys[id]
	}
	if !known {
		return nil, fmt.Errorf("the key %q is not one of the edge's", id)
	}
	return key, nil
}

func (v *Verifier) fetch() error {
	client := http.Client{Timeout: 10 * time.Second}
	answer, err := client.Get(v.Edge + "/.well-known/jwks.json")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("the key set: %s", answer.Status)
	}
	var set struct {
		Keys []struct{ Kty, Crv, X, Kid string }
	}
	if err := json.NewDecoder(answer.Body).Decode(&set); err != nil {
		return err
	}
	keys := map[string]ed25519.PublicKey{}
	for _, key := range set.Keys {
		raw, err := base64.RawURLEncoding.DecodeString(key.X)
		if err == nil && key.Kty == "OKP" && key.Crv == "Ed25519" && len(raw) == ed25519.PublicKeySize {
			keys[key.Kid] = raw
		}
	}
	v.keys, v.fetched = keys, time.Now()
	return nil
}

func decode(part string, into any) error {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

func main() {
	verifier := &Verifier{Edge: os.Args[1], Audience: os.Args[2]}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		email, err := verifier.Email(strings.TrimSpace(lines.Text()))
		if err != nil {
			fmt.Println("refused:", err)
			continue
		}
		fmt.Println(email)
	}
}

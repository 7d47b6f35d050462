// hashicorp/yamux doing the work that benchmarks/tunnel has Guestpass do, over plain TCP on loopback.
//
//	yamux serve                        prints its port, serves one connection after the other
//	yamux echo PORT STREAMS CONCURRENT each stream: open, send SIZE bytes, get them back, close
//	yamux bulk PORT BYTES              one stream; the server sends BYTES
//
// The client prints {"count": streams or bytes, "seconds": …, "cpu": its seconds of CPU}. Built without a network:
// GOPATH=/usr/share/gocode GO111MODULE=off go build (Debian: golang-go, golang-github-hashicorp-yamux-dev).
package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	size   = 200
	piece  = 64 * 1024
	window = 6 * 1024 * 1024 // Guestpass's largest
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func number(index int) uint64 {
	n, err := strconv.ParseUint(os.Args[index], 10, 64)
	check(err)
	return n
}

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.LogOutput = io.Discard
	if os.Getenv("YAMUX_WINDOW") != "default" {
		c.MaxStreamWindowSize = window
	}
	return c
}

// A stream's first byte tells what the client wants: 0 echoes size bytes, 1 is a request for as many bytes as the
// next eight say.
func serve(stream *yamux.Stream) {
	defer stream.Close()
	buffer := make([]byte, size)
	if _, err := io.ReadFull(stream, buffer); err != nil {
		return
	}
	if buffer[0] == 0 {
		stream.Write(buffer)
		return
	}
	left := binary.BigEndian.Uint64(buffer[1:9])
	out := make([]byte, piece)
	for left > 0 {
		n := uint64(piece)
		if n > left {
			n = left
		}
		if _, err := stream.Write(out[:n]); err != nil {
			return
		}
		left -= n
	}
}

func server() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		check(err)
		session, err := yamux.Server(connection, config())
		check(err)
		go func() {
			for {
				stream, err := session.AcceptStream()
				if err != nil {
					return
				}
				go serve(stream)
			}
		}()
	}
}

func dial() *yamux.Session {
	connection, err := net.Dial("tcp", "127.0.0.1:"+os.Args[2])
	check(err)
	session, err := yamux.Client(connection, config())
	check(err)
	return session
}

func exchange(session *yamux.Session, buffer []byte) {
	stream, err := session.OpenStream()
	check(err)
	_, err = stream.Write(buffer)
	check(err)
	_, err = io.ReadFull(stream, buffer)
	check(err)
	check(stream.Close())
}

func echo() float64 {
	session := dial()
	var left = int64(number(3))
	var group sync.WaitGroup
	begin := time.Now()
	for worker := uint64(0); worker < number(4); worker++ {
		group.Add(1)
		go func() {
			defer group.Done()
			buffer := make([]byte, size)
			for atomic.AddInt64(&left, -1) >= 0 {
				exchange(session, buffer)
			}
		}()
	}
	group.Wait()
	return time.Since(begin).Seconds()
}

func bulk() float64 {
	session := dial()
	stream, err := session.OpenStream()
	check(err)
	request := make([]byte, size)
	request[0] = 1
	binary.BigEndian.PutUint64(request[1:9], number(3))
	begin := time.Now()
	_, err = stream.Write(request)
	check(err)
	buffer := make([]byte, 4*piece)
	for left := number(3); left > 0; {
		n, err := stream.Read(buffer)
		check(err)
		left -= uint64(n)
	}
	return time.Since(begin).Seconds()
}

func report(count uint64, seconds float64) {
	var used syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &used))
	cpu := time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	fmt.Printf("{\"count\": %d, \"seconds\": %f, \"cpu\": %f}\n", count, seconds, cpu)
}

func main() {
	switch os.Args[1] {
	case "serve":
		server()
	case "echo":
		report(number(3), echo())
	case "bulk":
		report(number(3), bulk())
	}
}

// A js-libp2p node for test_js.py: node --import ./polyfill.mjs node.mjs noise|tls|plaintext [ADDRESS]
// It dials ADDRESS, tries everything, says a JSON object a line, and ends with its standard input.
import { createLibp2p } from 'libp2p'
import { tcp } from '@libp2p/tcp'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { plaintext } from '@libp2p/plaintext'
import { tls } from '@libp2p/tls'
import { multiaddr } from '@multiformats/multiaddr'

const [security, target] = process.argv.slice(2)
const ECHO = '/test/echo/1'
const TOPIC = '/test/gossip/1'
const SMALL = 5
const LARGE = 100_000

const say = (step, value) => console.log(JSON.stringify({ step, ...value }))

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [{ noise, tls, plaintext }[security]()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping(),
    pubsub: gossipsub({ globalSignaturePolicy: 'StrictSign', allowPublishToZeroTopicPeers: true })
  }
})

const until = async (condition, what) => {
  for (const end = Date.now() + 20_000; !condition();) {
    if (Date.now() > end) throw new Error(`waited in vain for ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

// Our streams carry messages behind their length, 32 bits big endian.
const echo = async (address, size) => {
  const stream = await node.dialProtocol(address, ECHO)
  const out = new Uint8Array(4 + size)
  new DataView(out.buffer).setUint32(0, size)
  for (let i = 4; i < out.length; i++) out[i] = (i * 31) & 255
  let got = 0
  let wrong = 0
  const done = new Promise((resolve, reject) => {
    stream.addEventListener('message', (event) => {
      for (const byte of event.data.subarray()) wrong += byte !== out[got++]
      if (got >= out.length) resolve()
    })
    stream.addEventListener('close', () => reject(new Error(`closed after ${got} bytes`)))
  })
  for (let at = 0; at < out.length; at += 65536) {
    if (!stream.send(out.subarray(at, at + 65536))) await stream.onDrain()
  }
  await done
  await stream.close()
  return { got: got - 4, wrong }
}

await node.handle(ECHO, async (given) => {
  const stream = given.stream ?? given
  for await (const data of stream) {
    if (!stream.send(data)) await stream.onDrain()
  }
  await stream.close()
})

const heard = []
node.services.pubsub.addEventListener('message', (event) => {
  heard.push({ from: String(event.detail.from), size: event.detail.data.length })
})
let identified
node.addEventListener('peer:identify', (event) => { identified = event.detail })

const tryAll = async (address) => {
  const connection = await node.dial(address)
  say('dial', { security: connection.encryption, muxer: connection.multiplexer })
  await until(() => identified !== undefined, 'identify')
  say('identify', { protocols: identified.protocols, addresses: identified.listenAddrs.map(String) })
  say('ping', { ms: await node.services.ping.ping(address) })
  say('echo', await echo(address, 1000))
  say('echo', await echo(address, 10_000_000))
  node.services.pubsub.subscribe(TOPIC)
  await until(() => node.services.pubsub.getSubscribers(TOPIC).length > 0, 'a subscriber')
  say('subscribed', {})
  for (let i = 0; i < SMALL; i++) {
    await node.services.pubsub.publish(TOPIC, new TextEncoder().encode(`from js ${i}`))
  }
  await node.services.pubsub.publish(TOPIC, new Uint8Array(LARGE).fill(7))
  await until(() => heard.length > SMALL, 'gossip')
  say('gossip', { heard })
}

say('listening', { address: String(node.getMultiaddrs()[0]), peer: String(node.peerId) })
if (target) {
  try {
    await tryAll(multiaddr(target))
  } catch (error) {
    say('failed', { error: `${error.name}: ${error.message}` })
  }
}
process.stdin.on('end', () => process.exit(0)).resume()

// A js-libp2p node under remote control: one JSON command a line on stdin, one JSON answer a line on stdout.
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { quic } from '@chainsafe/libp2p-quic'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const node = await createLibp2p({
  addresses: { listen: [process.argv[2] === 'quic-v1' ? '/ip4/127.0.0.1/udp/0/quic-v1' : '/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp(), quic()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() },
  connectionGater: { denyDialMultiaddr: async () => false },
  nodeInfo: { userAgent: 'js-interop/1' }
})

const bulk = '/test/echo/1'
await node.handle(bulk, async (stream) => {
  for await (const part of stream) {
    if (!stream.send(part)) {
      await new Promise((resolve) => stream.addEventListener('drain', resolve, { once: true }))
    }
  }
  await stream.close()
})

function bytesOf (part) {
  return part.subarray === undefined ? part : part.subarray()
}

const commands = {
  async info () {
    return { peer: node.peerId.toString(), addresses: node.getMultiaddrs().map(String), connections: node.getConnections().length }
  },
  async dial ({ address }) {
    // js-libp2p identifies by itself, on the one stream it allows for that: what comes next shall not meet it.
    const identified = new Promise((resolve) => node.addEventListener('peer:identify', resolve, { once: true }))
    const connection = await node.dial(multiaddr(address))
    await identified
    return { peer: connection.remotePeer.toString(), encryption: connection.encryption, multiplexer: connection.multiplexer }
  },
  async identify ({ peer }) {
    const connection = node.getConnections(peerIdFromString(peer))[0]
    const said = await node.services.identify.identify(connection)
    return { peer: said.peerId.toString(), agent: said.agentVersion, protocols: said.protocols, addresses: said.listenAddrs.map(String) }
  },
  async ping ({ peer, count }) {
    let done = 0
    while (done < count) {
      try {
        await node.services.ping.ping(peerIdFromString(peer))
        done++
      } catch (problem) {
        // One stream of pings at a time: the last one's end may still be on its way.
        if (problem.name !== 'TooManyOutboundProtocolStreamsError') throw problem
        await new Promise((resolve) => setTimeout(resolve, 10))
      }
    }
    return { done }
  },
  async echo ({ peer, bytes }) {
    const stream = await node.dialProtocol(peerIdFromString(peer), bulk)
    const sent = new Uint8Array(bytes).map((_, i) => (i * 7 + (i >> 8)) & 0xff)
    let received = 0
    let same = true
    const reading = (async () => {
      for await (const part of stream) {
        for (const byte of bytesOf(part)) {
          same &&= byte === sent[received]
          received++
        }
      }
    })()
    for (let at = 0; at < bytes; at += 60000) {
      if (!stream.send(sent.subarray(at, Math.min(at + 60000, bytes)))) {
        await new Promise((resolve) => stream.addEventListener('drain', resolve, { once: true }))
      }
    }
    await stream.close()
    await reading
    return { received, same }
  },
  async hangup ({ peer }) {
    await node.hangUp(peerIdFromString(peer))
    return {}
  }
}

console.log(JSON.stringify(await commands.info()))
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  try {
    console.log(JSON.stringify(await commands[command.do](command)))
  } catch (error) {
    console.log(JSON.stringify({ error: `${error.name}: ${error.message}` }))
  }
}
await node.stop()
process.exit(0)

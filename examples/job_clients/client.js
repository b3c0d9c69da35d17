// SPDX-License-Identifier: ZPL-2.1
// Submit a job and watch it: node client.js ADDRESS TYPE ARGS [cancel]

const { randomUUID } = require('crypto')
const zmq = require('zeromq')

async function main(address, type, args, mode) {
  const socket = new zmq.Request({ linger: 0, sendTimeout: 30000, receiveTimeout: 30000 })
  socket.connect(address)

  async function ask(...message) {
    await socket.send(JSON.stringify(message))
    const frames = await socket.receive()
    const [status, payload] = JSON.parse(frames[frames.length - 1])
    if (status >= 300) throw new Error(`${status} ${payload}`)
    return payload
  }

  // The id is made here: if the reply is lost, the same message can be sent again.
  const { id } = await ask(type, JSON.parse(args), { id: randomUUID() })
  let job = { revision: null }
  do {
    const after = job.revision
    job = await ask('pyams_zmq.job.wait', { id, after, timeout: 20 })
    if (job.revision !== after) console.log(job.state, job.progress ? job.progress.done : '')
    if (job.progress && mode === 'cancel') {
      mode = null
      await ask('pyams_zmq.job.cancel', { id })
    }
  } while (job.ended === null)
  console.log(JSON.stringify(job.reply))
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message)
  process.exit(1)
})

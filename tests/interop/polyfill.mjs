// Node 20 lacks these; js-libp2p is written for 22.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
Array.fromAsync ??= async (items) => {
  const all = []
  for await (const item of items) all.push(item)
  return all
}

export * as arrow from 'apache-arrow'
export { Client, connect } from './client.js'
export { FletcherError } from './errors.js'

#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

mod client;
mod embed;
mod error;
mod put;

pub use client::{Builder, Client, Model};
pub use embed::Embed;
pub use error::{Error, Result, RowError};
pub use put::{Ack, Put, Summary};

//! What builder and robot tell each other in files and in JSON. Each form has one definition here, which the side that
//! writes it and the side that reads it both use. What was written once is read for ever: `contract/tests/fixtures` has
//! every earlier form.
//!
//! The crate is pure: it touches no file, starts no program, and knows nothing of a command line.
//!
//! | form | written by | read by |
//! |---|---|---|
//! | [`device_file`]: `device.toml` in the image | the overlay's template `device.toml.j2` | the agent, `inspect` |
//! | [`api_file`]: `api.toml` in the image | `compose` | the agent |
//! | [`seed_file`]: `slipway-seed.toml` on the boot partition | `flash` | the agent, in the first boot |
//! | [`health_file`]: checks in `/etc/slotd/health.d` | overlays | the agent, `run --local` |
//! | [`answer`], [`refusal`]: what `slotd --format json` prints | the agent | `push`, `bench` |
//! | [`request`]: what the agent is asked for | every client of the agent | the agent |
//! | [`job`]: a long operation of the agent, in `/run/slotd` | the agent | every client of the agent |
//! | [`names`]: what a host name is, an SSID, a country | | all of these |

pub mod answer;
pub mod api_file;
pub mod device_file;
pub mod health_file;
pub mod job;
pub mod names;
pub mod refusal;
pub mod request;
pub mod seed_file;

pub use refusal::Refusal;

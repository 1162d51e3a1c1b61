//! One direction of a session: bytes from a source to a sink, with a bounded amount in flight.

/// The state of a direction.
///
/// ```text
/// Flowing ◀──drained── Paused        Flowing or Paused ──end of stream──▶ Ended
///    └─────at limit──────▲           any ──the sink broke──▶ Broken
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The source is being read.
    Flowing,
    /// The source is not read until the sink has taken more.
    Paused,
    /// The source has ended; what is in flight still goes out.
    Ended,
    /// The sink takes nothing any more; what comes is dropped.
    Broken,
}

/// What to do with the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on as before.
    Keep,
    /// Stop reading it.
    Pause,
    /// Read it again.
    Resume,
}

/// One direction of a session. It counts bytes; the driver holds them.
#[derive(Debug)]
pub struct Relay {
    state: State,
    in_flight: u32,
}

impl Default for Relay {
    fn default() -> Self {
        Self { state: State::Flowing, in_flight: 0 }
    }
}

impl Relay {
    /// Bytes arrived from the source. At `limit` bytes in flight, reading stops.
    pub fn on_received(&mut self, bytes: u32, limit: u32) -> Flow {
        if self.state == State::Broken {
            return Flow::Keep;
        }
        self.in_flight += bytes;
        if self.state == State::Flowing && self.in_flight >= limit {
            self.state = State::Paused;
            return Flow::Pause;
        }
        Flow::Keep
    }

    /// The sink took bytes. Reading starts again at half of `limit`, so that it does not flap.
    pub fn on_sent(&mut self, bytes: u32, limit: u32) -> Flow {
        debug_assert!(bytes <= self.in_flight || self.state == State::Broken);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if self.state == State::Paused && self.in_flight <= limit / 2 {
            self.state = State::Flowing;
            return Flow::Resume;
        }
        Flow::Keep
    }

    /// The source ended.
    pub fn on_ended(&mut self) {
        if self.state != State::Broken {
            self.state = State::Ended;
        }
    }

    /// The sink broke: nothing that is in flight will arrive.
    pub fn on_broken(&mut self) {
        self.state = State::Broken;
        self.in_flight = 0;
    }

    /// Whether the source is not read until the sink has taken more.
    pub fn is_paused(&self) -> bool {
        self.state == State::Paused
    }

    /// Whether the sink takes nothing any more.
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Whether the source has ended or the sink has broken.
    pub fn is_ending(&self) -> bool {
        matches!(self.state, State::Ended | State::Broken)
    }

    /// Whether the source has ended in order, and the sink's socket has taken all that it sent.
    pub fn is_complete(&self) -> bool {
        self.state == State::Ended && self.in_flight == 0
    }

    /// Whether nothing more will happen in this direction.
    pub fn is_done(&self) -> bool {
        self.is_ending() && self.in_flight == 0
    }

    /// Bytes received and not yet taken by the sink.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit_and_starts_again_at_half() {
        let mut relay = Relay::default();
        assert_eq!(relay.on_received(60, 100), Flow::Keep);
        assert_eq!(relay.on_received(40, 100), Flow::Pause);
        assert_eq!(relay.on_received(30, 100), Flow::Keep, "late bytes are counted all the same");
        assert_eq!(relay.on_sent(79, 100), Flow::Keep);
        assert_eq!(relay.on_sent(1, 100), Flow::Resume);
        assert_eq!(relay.on_sent(50, 100), Flow::Keep);
        assert_eq!(relay.in_flight(), 0);
    }

    #[test]
    fn a_direction_is_done_when_its_end_and_all_its_bytes_went_through() {
        let mut relay = Relay::default();
        relay.on_received(10, 100);
        relay.on_ended();
        assert!(relay.is_ending() && !relay.is_done() && !relay.is_complete());
        assert_eq!(relay.on_sent(10, 100), Flow::Keep, "an ended source is not read again");
        assert!(relay.is_done() && relay.is_complete());
    }

    #[test]
    fn a_broken_direction_drops_what_comes() {
        let mut relay = Relay::default();
        relay.on_received(10, 100);
        relay.on_broken();
        relay.on_received(1000, 100);
        relay.on_ended();
        assert!(relay.is_broken() && relay.is_done() && !relay.is_complete());
    }
}

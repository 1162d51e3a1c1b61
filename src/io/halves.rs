//! The two halves of a connection, alike in all drivers.
//!
//! What state a half is in follows from what its user has asked for and has been notified of. How far the
//! driver is with it is the driver's own affair, `P`, and is there only in the states that have it:
//! a half that has ended waits in no queue, and one that is broken waits for no room.
//!
//! An event is a row of a table: from which states it leads where. From any other it cannot come,
//! and is a mistake of the driver or of its user.

/// Makes each event of a table a function. It panics where the event cannot come.
macro_rules! transitions {
    (impl[$($generics:tt)*] $state:ty {
        $($(#[$doc:meta])* $event:ident($($arg:ident: $type:ty)?) {
            $($from:pat => $to:expr),+ $(,)?
        })+
    }) => {
        impl<$($generics)*> $state {
            $($(#[$doc])*
            #[inline]
            pub(in crate::io) fn $event(&mut self $(, $arg: $type)?) {
                #[allow(unreachable_patterns, reason = "some events can always come")]
                match *self {
                    $($from => *self = $to,)+
                    _ => $crate::io::halves::illegal(stringify!($event), self),
                }
            })+
        }

        #[cfg(test)]
        impl<$($generics)*> $state {
            /// The table, a row for each event and state.
            pub(in crate::io) fn table(states: &[Self]) -> String {
                let mut table = String::new();
                $(for &state in states {
                    $(let $arg = <$type>::default();)?
                    #[allow(unreachable_patterns, reason = "some events can always come")]
                    let to: Option<Self> = match state {
                        $($from => Some($to),)+
                        _ => None,
                    };
                    let to = to.map_or("illegal".to_string(), |to| format!("{to:?}"));
                    table += &format!("{}: {state:?} -> {to}\n", stringify!($event));
                })+
                table
            }
        }
    };
}

pub(super) use transitions;

#[cold]
#[inline(never)]
pub(super) fn illegal(event: &str, state: &dyn std::fmt::Debug) -> ! {
    panic!("{event} in {state:?}")
}

/// The receiving half of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving<P> {
    /// Nobody has wanted to receive so far.
    Unused(P),
    /// The user wants to receive.
    Wanted(P),
    /// The user has wanted to, and does not now.
    Stopped(P),
    /// The peer's direction has ended or failed.
    Ended,
}

transitions! { impl[P: std::fmt::Debug + Copy] Receiving<P> {
    /// The user wants to receive.
    want() {
        Self::Unused(p) | Self::Wanted(p) | Self::Stopped(p) => Self::Wanted(p),
        Self::Ended => Self::Ended,
    }
    /// The user does not want to receive for now.
    stop() {
        Self::Unused(p) | Self::Wanted(p) | Self::Stopped(p) => Self::Stopped(p),
        Self::Ended => Self::Ended,
    }
    /// The peer's end has been received, or a failure. That may be what a stop came too late for.
    end() {
        Self::Wanted(_) | Self::Stopped(_) => Self::Ended,
    }
} }

impl<P: Copy> Receiving<P> {
    /// How far the driver is.
    #[inline]
    pub(super) fn progress(&self) -> Option<P> {
        match *self {
            Self::Unused(p) | Self::Wanted(p) | Self::Stopped(p) => Some(p),
            Self::Ended => None,
        }
    }

    /// How far the driver is, to go on.
    #[inline]
    pub(super) fn progress_mut(&mut self) -> Option<&mut P> {
        match self {
            Self::Unused(p) | Self::Wanted(p) | Self::Stopped(p) => Some(p),
            Self::Ended => None,
        }
    }
}

/// The sending half of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending<P> {
    /// There is no connection yet.
    Connecting,
    /// It takes what is to be sent.
    Open(P),
    /// It is to end behind what is queued.
    Ending(P),
    /// It has ended.
    Ended,
    /// Nothing more can be sent, as the user was notified.
    Broken,
}

transitions! { impl[P: std::fmt::Debug + Copy + Default] Sending<P> {
    /// The connection is made.
    connect() {
        Self::Connecting => Self::Open(P::default()),
    }
    /// The user ends the direction, behind what is queued.
    shut_down() {
        Self::Open(p) | Self::Ending(p) => Self::Ending(p),
        Self::Ended => Self::Ended,
        Self::Broken => Self::Broken,
    }
    /// All that was queued is sent, and the end behind it.
    end() {
        Self::Ending(_) => Self::Ended,
    }
    /// The connection broke, or could not be made. The user is notified only once.
    break_off() {
        Self::Connecting | Self::Open(_) | Self::Ending(_) | Self::Ended => Self::Broken,
    }
} }

impl<P: Copy> Sending<P> {
    /// Whether bytes may be queued, of which those behind a break are discarded.
    pub(super) fn takes_bytes(&self) -> bool {
        matches!(self, Self::Open(_) | Self::Broken)
    }

    /// How far the driver is.
    #[inline]
    pub(super) fn progress(&self) -> Option<P> {
        match *self {
            Self::Open(p) | Self::Ending(p) => Some(p),
            Self::Connecting | Self::Ended | Self::Broken => None,
        }
    }

    /// How far the driver is, to go on.
    #[inline]
    pub(super) fn progress_mut(&mut self) -> Option<&mut P> {
        match self {
            Self::Open(p) | Self::Ending(p) => Some(p),
            Self::Connecting | Self::Ended | Self::Broken => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receiving_half_changes_as_its_table_says() {
        let states = [
            Receiving::Unused(()),
            Receiving::Wanted(()),
            Receiving::Stopped(()),
            Receiving::Ended,
        ];
        let table = "\
want: Unused(()) -> Wanted(())
want: Wanted(()) -> Wanted(())
want: Stopped(()) -> Wanted(())
want: Ended -> Ended
stop: Unused(()) -> Stopped(())
stop: Wanted(()) -> Stopped(())
stop: Stopped(()) -> Stopped(())
stop: Ended -> Ended
end: Unused(()) -> illegal
end: Wanted(()) -> Ended
end: Stopped(()) -> Ended
end: Ended -> illegal
";
        assert_eq!(Receiving::table(&states), table);
    }

    #[test]
    fn the_sending_half_changes_as_its_table_says() {
        let states = [
            Sending::Connecting,
            Sending::Open(()),
            Sending::Ending(()),
            Sending::Ended,
            Sending::Broken,
        ];
        let table = "\
connect: Connecting -> Open(())
connect: Open(()) -> illegal
connect: Ending(()) -> illegal
connect: Ended -> illegal
connect: Broken -> illegal
shut_down: Connecting -> illegal
shut_down: Open(()) -> Ending(())
shut_down: Ending(()) -> Ending(())
shut_down: Ended -> Ended
shut_down: Broken -> Broken
end: Connecting -> illegal
end: Open(()) -> illegal
end: Ending(()) -> Ended
end: Ended -> illegal
end: Broken -> illegal
break_off: Connecting -> Broken
break_off: Open(()) -> Broken
break_off: Ending(()) -> Broken
break_off: Ended -> Broken
break_off: Broken -> illegal
";
        assert_eq!(Sending::table(&states), table);
    }

    #[test]
    #[should_panic(expected = "end in Ended")]
    fn an_event_that_cannot_come_is_refused() {
        let mut half = Receiving::Wanted(());
        half.end();
        half.end();
    }
}

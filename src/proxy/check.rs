//! What an endpoint's active checks come to: so many in a row say something else than before, and it
//! is out of use, or in use again.

/// The checks of one endpoint.
#[derive(Debug)]
pub struct Verdicts {
    /// Failures in a row that take it out of use.
    fall: u32,
    /// Successes in a row that bring it back.
    rise: u32,
    fails: bool,
    /// Checks in a row that say otherwise.
    contrary: u32,
}

impl Verdicts {
    /// Of an endpoint that was not checked yet, which is in use.
    pub fn new(fall: u32, rise: u32) -> Self {
        Self { fall, rise, fails: false, contrary: 0 }
    }

    /// A check has passed, or not. Says what the endpoint is from now on, if that is something else:
    /// whether it fails its checks.
    pub fn on_check(&mut self, passed: bool) -> Option<bool> {
        if passed != self.fails {
            self.contrary = 0;
            return None;
        }
        self.contrary += 1;
        let enough = if self.fails { self.rise } else { self.fall };
        if self.contrary < enough {
            return None;
        }
        self.contrary = 0;
        self.fails = !self.fails;
        Some(self.fails)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_in_a_row_take_an_endpoint_out_and_bring_it_back() {
        for (fall, rise, checks, expected) in [
            (3, 2, "...", "   "),
            (3, 2, "xx.xx.xxx", "        -"),
            (3, 2, "xxx.x..", "  -   +"),
            (3, 2, "xxx..xxx", "  - +  -"),
            (1, 1, "x.x.", "-+-+"),
            (1, 3, "x..x...", "-     +"),
        ] {
            let mut verdicts = Verdicts::new(fall, rise);
            let after = |check| {
                let change = verdicts.on_check(check == '.');
                change.map_or(' ', |fails| if fails { '-' } else { '+' })
            };
            let found: String = checks.chars().map(after).collect();
            assert_eq!(found, expected, "{fall}, {rise}: {checks}");
        }
    }
}

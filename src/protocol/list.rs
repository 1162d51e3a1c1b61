//! What is made of the list of protocols.

/// Words as a sentence gives them: `a, b or c`.
macro_rules! one_of {
    ($only:literal) => { $only };
    ($first:literal $last:literal) => { concat!($first, " or ", $last) };
    ($first:literal $($rest:literal)+) => { concat!($first, ", ", one_of!($($rest)+)) };
}

/// Makes of the protocols' types, each with the word that users write for it, the enums
/// [`ProtocolName`](super::ProtocolName) and [`Conversation`](super::Conversation).
macro_rules! protocols {
    ($($module:ident::$name:ident = $word:literal,)+) => {
        /// One of the protocols.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ProtocolName {
            $(#[doc = concat!("The protocol of [`", stringify!($module), "`].")] $name,)+
        }

        impl ProtocolName {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The words that users write for them, as a sentence gives them.
            pub const WORDS: &'static str = one_of!($($word)+);

            /// The word that users write for it.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// What holds for all its connections.
            pub const fn facts(self) -> &'static Facts {
                match self { $(Self::$name => &<$module::$name as Protocol>::FACTS,)+ }
            }

            /// See [`Protocol::peek_max`].
            pub fn peek_max(self, settings: &Settings) -> usize {
                match self { $(Self::$name => $module::$name::peek_max(settings),)+ }
            }

            /// See [`Protocol::write_error`].
            pub fn write_error(
                self,
                error: ErrorReply,
                text: fmt::Arguments<'_>,
                space: &mut dyn Write,
            ) -> io::Result<()> {
                match self { $(Self::$name => $module::$name::write_error(error, text, space),)+ }
            }

            /// See [`Protocol::is_live`].
            pub fn is_live(self, reply: &[u8]) -> Option<bool> {
                match self { $(Self::$name => $module::$name::is_live(reply),)+ }
            }

            /// See [`Protocol::is_success`].
            pub fn is_success(self, reply: &[u8]) -> bool {
                match self { $(Self::$name => $module::$name::is_success(reply),)+ }
            }

            /// See [`Protocol::write_combined`].
            pub fn write_combined(
                self,
                answers: &Answers<'_>,
                space: &mut dyn Write,
            ) -> io::Result<()> {
                match self { $(Self::$name => $module::$name::write_combined(answers, space),)+ }
            }
        }

        impl fmt::Display for ProtocolName {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl std::str::FromStr for ProtocolName {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$name),)+
                    _ => Err("not one of the choices".to_owned()),
                }
            }
        }

        /// The commands of each.
        const COMMANDS: &[&[&str]] = &[$(<$module::$name as Protocol>::FACTS.commands,)+];

        /// What one client's connection is in the middle of, in any of the protocols: each method is
        /// the one of [`Protocol`].
        #[allow(clippy::large_enum_variant, reason = "all of a worker's are the same variant")]
        #[allow(missing_docs)]
        #[derive(Debug)]
        pub enum Conversation { $($name($module::$name),)+ }

        #[allow(missing_docs)]
        impl Conversation {
            pub fn new(protocol: ProtocolName, settings: &Settings) -> Self {
                match protocol {
                    $(ProtocolName::$name => Self::$name($module::$name::new(settings)),)+
                }
            }

            pub fn on_request_bytes(&mut self, bytes: &[u8]) -> RequestEnd {
                match self { $(Self::$name(protocol) => protocol.on_request_bytes(bytes),)+ }
            }

            pub fn is_refused(&self) -> bool {
                match self { $(Self::$name(protocol) => protocol.is_refused(),)+ }
            }

            pub fn is_sent_on(&self, seen: usize, held_max: usize) -> bool {
                match self { $(Self::$name(protocol) => protocol.is_sent_on(seen, held_max),)+ }
            }

            pub fn request<'a>(&self, front: &'a [u8]) -> Result<Request<'a>, ErrorReply> {
                match self { $(Self::$name(protocol) => protocol.request(front),)+ }
            }

            pub fn on_sent(&mut self) {
                match self { $(Self::$name(protocol) => protocol.on_sent(),)+ }
            }

            pub fn on_reply_bytes(&mut self, bytes: &[u8]) -> Reply {
                match self { $(Self::$name(protocol) => protocol.on_reply_bytes(bytes),)+ }
            }

            pub fn keeps_alive(&self) -> bool {
                match self { $(Self::$name(protocol) => protocol.keeps_alive(),)+ }
            }

            pub fn ends_with_connection(&self) -> bool {
                match self { $(Self::$name(protocol) => protocol.ends_with_connection(),)+ }
            }

            pub fn refuses(&self) -> bool {
                match self { $(Self::$name(protocol) => protocol.refuses(),)+ }
            }
        }
    };
}

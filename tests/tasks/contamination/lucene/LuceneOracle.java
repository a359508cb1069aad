import java.io.BufferedReader;
import java.io.BufferedWriter;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.regex.Pattern;
import org.apache.lucene.analysis.Analyzer;
import org.apache.lucene.analysis.LowerCaseFilter;
import org.apache.lucene.analysis.TokenStream;
import org.apache.lucene.analysis.Tokenizer;
import org.apache.lucene.analysis.pattern.PatternTokenizer;
import org.apache.lucene.analysis.tokenattributes.CharTermAttribute;
import org.apache.lucene.document.Document;
import org.apache.lucene.document.Field;
import org.apache.lucene.document.TextField;
import org.apache.lucene.index.DirectoryReader;
import org.apache.lucene.index.IndexWriter;
import org.apache.lucene.index.IndexWriterConfig;
import org.apache.lucene.index.LeafReaderContext;
import org.apache.lucene.index.NoMergePolicy;
import org.apache.lucene.index.Term;
import org.apache.lucene.search.BooleanClause;
import org.apache.lucene.search.BooleanQuery;
import org.apache.lucene.search.IndexSearcher;
import org.apache.lucene.search.MatchNoDocsQuery;
import org.apache.lucene.search.PhraseQuery;
import org.apache.lucene.search.Query;
import org.apache.lucene.search.ScoreMode;
import org.apache.lucene.search.SimpleCollector;
import org.apache.lucene.search.TermQuery;
import org.apache.lucene.store.ByteBuffersDirectory;

/**
 * Which turns hold every field of which query, by Lucene: the analyzer and the phrase queries that open-instruct's
 * decontamination asks a server for. Arguments: turns (one base64 text a line), queries (base64 fields, each followed by
 * a tab), output (per query the numbers of the turns that it hits, all of them, separated by spaces).
 */
public class LuceneOracle {
    static final Pattern SEPARATORS = Pattern.compile("[ ,.?!:;()\"-]|\n|\\\\");

    static final Analyzer ANALYZER = new Analyzer() {
        @Override
        protected TokenStreamComponents createComponents(String field) {
            Tokenizer tokenizer = new PatternTokenizer(SEPARATORS, -1);
            return new TokenStreamComponents(tokenizer, new LowerCaseFilter(tokenizer));
        }
    };

    static class Hits extends SimpleCollector {
        final StringBuilder line = new StringBuilder();
        int base;

        @Override
        protected void doSetNextReader(LeafReaderContext context) {
            base = context.docBase;
        }

        @Override
        public void collect(int document) {
            line.append(base + document).append(' ');
        }

        @Override
        public ScoreMode scoreMode() {
            return ScoreMode.COMPLETE_NO_SCORES;
        }
    }

    static String decode(String base64) {
        return new String(Base64.getDecoder().decode(base64), StandardCharsets.UTF_8);
    }

    static Query phrase(String text) throws IOException {
        List<Term> terms = new ArrayList<>();
        try (TokenStream stream = ANALYZER.tokenStream("text", text)) {
            CharTermAttribute attribute = stream.addAttribute(CharTermAttribute.class);
            stream.reset();
            while (stream.incrementToken()) terms.add(new Term("text", attribute.toString()));
            stream.end();
        }
        if (terms.isEmpty()) return new MatchNoDocsQuery();
        if (terms.size() == 1) return new TermQuery(terms.get(0));
        PhraseQuery.Builder builder = new PhraseQuery.Builder().setSlop(0);
        terms.forEach(builder::add);
        return builder.build();
    }

    public static void main(String[] paths) throws IOException {
        ByteBuffersDirectory directory = new ByteBuffersDirectory();
        // Without merges segments stay in the order of adding, so a document's number is that of its turn.
        IndexWriterConfig config = new IndexWriterConfig(ANALYZER).setMergePolicy(NoMergePolicy.INSTANCE);
        try (IndexWriter writer = new IndexWriter(directory, config.setRAMBufferSizeMB(512));
                BufferedReader turns = Files.newBufferedReader(Path.of(paths[0]))) {
            for (String line = turns.readLine(); line != null; line = turns.readLine()) {
                Document document = new Document();
                document.add(new TextField("text", decode(line), Field.Store.NO));
                writer.addDocument(document);
            }
        }
        try (DirectoryReader reader = DirectoryReader.open(directory);
                BufferedReader queries = Files.newBufferedReader(Path.of(paths[1]));
                BufferedWriter output = Files.newBufferedWriter(Path.of(paths[2]))) {
            IndexSearcher searcher = new IndexSearcher(reader);
            searcher.setQueryCache(null);
            for (String line = queries.readLine(); line != null; line = queries.readLine()) {
                BooleanQuery.Builder every = new BooleanQuery.Builder();
                for (int start = 0, tab; (tab = line.indexOf('\t', start)) >= 0; start = tab + 1) {
                    every.add(phrase(decode(line.substring(start, tab))), BooleanClause.Occur.FILTER);
                }
                Hits hits = new Hits();
                searcher.search(every.build(), hits);
                output.append(hits.line).append('\n');
            }
        }
    }
}
